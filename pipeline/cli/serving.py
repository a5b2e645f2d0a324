"""Commands ``export``, ``serve`` and ``bank``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.app import app, bank_app
from pipeline.cli.options import FAILED, USAGE, AsJson, Bank
from pipeline.cli.output import echo, print_json, print_table
from pipeline.cli.session import exit_on_error, working

if TYPE_CHECKING:
    from pipeline.serving.export import Source
    from pipeline.serving.registry import Registered

BaseFolder = Annotated[
    str | None, typer.Option("--base", help="Where the base LM lies now, if it moved since training.")
]

MetricsPort = Annotated[
    int | None, typer.Option("--metrics-port", min=1, max=65535, help="Where a local Ray answers Prometheus.")
]


ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="LATENT_CONTROL_API_KEY",
        show_envvar=True,
        help="Requests must send it; other processes see the option, so rather set the variable.",
    ),
]
DecodeWay = Annotated[
    Literal["code", "token"] | None,
    typer.Option(
        "--decode",
        help="Where a request does not say: by code, or by token from the mixture over the likeliest codes (each "
        "costs a pass of the language head); default: the export's.",
    ),
]
PolicySource = Annotated[Path, typer.Argument(metavar="RUN", help="A run (its last policy), or RUN/checkpoints/STAGE.")]
MemberName = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A member; @VERSION may be an alias.")]


@app.command()
def export(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run (its last policy), RUN/checkpoints/STAGE, or an export to register."),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FOLDER", help="Default: RUN/export; of a checkpoint, export.")
    ] = None,
    base: BaseFolder = None,
    reference_base: Annotated[
        bool, typer.Option("--reference-base", help="Do not copy the base LM; keep its place and hash.")
    ] = False,
    register: Annotated[
        str | None, typer.Option("--register", metavar="NAME", help="Also register it in MLflow under NAME.")
    ] = None,
    alias: Annotated[
        str | None, typer.Option("--alias", help="Point this alias at the registered version, e.g. champion.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="URI", help="MLflow's tracking URI; default: the run's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write RUN's policy, with all it needs to answer, into a folder: no inverse dynamics model, safetensors and JSON
    only."""
    target = target.absolute()
    with exit_on_error(USAGE):
        if register is None and (alias or store):
            raise ValueError(f"{'--alias' if alias else '--store'} needs --register NAME")
        from pipeline.serving import export as exporting

        done_before = exporting.is_export(target)
        if done_before and (register is None or out is not None):
            raise ValueError(
                f"{target} is an export already: register it with --register NAME, or serve it with "
                "latent-control serve"
            )
        source = None if done_before else exporting.find(target)
        folder = (
            target
            if done_before
            else (out or (target if source and source.run_dir == target else Path.cwd()) / "export").absolute()
        )
        place = _store(source, store) if register is not None else None
        if register is not None:
            from pipeline.serving.registry import require_names

            require_names(register, alias)
    with working():
        if source is not None:
            exporting.export(source, folder, base=base, reference=reference_base)
        registered = None if place is None or register is None else _register(folder, register, place, alias)
    _report(target, folder, registered, as_json)


def _store(source: Source | None, store: str | None) -> tuple[str, str]:
    """(tracking URI, experiment) where a model is registered."""
    from configs.schema import Tracking
    from pipeline.tracking.uris import experiment_of, tracking_uri

    config = None if source is None else source.config()
    tracking = Tracking() if config is None else config.tracking
    if store is not None:
        return tracking_uri(store, Path.cwd()), experiment_of(tracking)
    if source is None or source.run_dir is None or config is None:
        raise ValueError(
            "which MLflow store? This is not a run: name it with --store URI, e.g. --store sqlite:///runs/mlflow.db"
        )
    return tracking_uri(tracking.uri, source.run_dir), experiment_of(tracking)


def _register(folder: Path, name: str, place: tuple[str, str], alias: str | None) -> Registered:
    from pipeline.serving.registry import register

    return register(folder, name, store=place[0], experiment=place[1], alias=alias)


def _report(target: Path, folder: Path, registered: Registered | None, as_json: bool) -> None:
    if as_json:
        result: dict[str, Any] = {"folder": str(folder), "registered": asdict(registered) if registered else None}
        print_json(result)
        return
    echo(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB")
    if registered:
        echo(
            f"registered in {registered.store}: "
            f"{registered.uri}" + (f", alias {registered.alias}" if registered.alias else "")
        )
    echo(f"serve it: latent-control serve {folder}")


@app.command()
def serve(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER_OR_RUN", help="An export, a run (its last policy), RUN/checkpoints/STAGE, or a bank."
        ),
    ],
    host: Annotated[
        str, typer.Option("--host", help="Address to bind to; 0.0.0.0 opens the service to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="Model name in requests; default: the folder's.")] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1)] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows decoded together, at most.")] = 256,
    queue: Annotated[
        int, typer.Option("--queue", min=0, help="Rows that may wait for a place; more are refused (429).")
    ] = 1024,
    api_key: ApiKey = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of a replica.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus", min=0.0, help="GPUs of a replica.")] = 0.0,
    address: Annotated[str, typer.Option("--address", help="Of the Ray cluster; local: start one.")] = "local",
    decode: DecodeWay = None,
    base: BaseFolder = None,
    metrics_port: MetricsPort = None,
) -> None:
    """Answer /v1/completions and /v1/chat/completions (OpenAI's protocol, with codes) until Ctrl-C."""
    target = target.absolute()
    with tempfile.TemporaryDirectory(prefix="latent-control-") as temporary:
        with exit_on_error(USAGE):
            from pipeline.serving import deploy
            from pipeline.serving import export as exporting
            from pipeline.serving.bank import is_bank

            settings = deploy.ServingSettings(
                folder=target,
                name=name or target.name,
                host=host,
                port=port,
                replicas=replicas,
                batch_size=batch_size,
                queue=queue,
                key=None if api_key is None else deploy.require_api_key(api_key),
                threads=threads,
                gpus=gpus,
                address=address,
                decode=decode,
                base=base,
                metrics_port=metrics_port,
            )
            deploy.require_port(settings)
            if not exporting.is_export(target) and not is_bank(target):
                source = exporting.find(target)
                settings = replace(settings, folder=Path(temporary) / "export", base=None)
                exporting.export(source, settings.folder, base=base, reference=True)
            deploy.check(settings)
        with exit_on_error(FAILED):
            deploy.serve_forever(settings, echo)


@bank_app.command("create")
def bank_create(
    bank: Bank,
    source: Annotated[
        Path, typer.Option("--from", metavar="RUN", help="Whose base LM, codebook and merge module its policies share.")
    ],
    base: BaseFolder = None,
    bundle: Annotated[
        bool, typer.Option("--bundle-base", help="Copy the base LM instead of naming its place.")
    ] = False,
) -> None:
    """Make a bank without policies; a run's own is added by bank add."""
    with exit_on_error(USAGE):
        from pipeline.serving import bank as banks
        from pipeline.serving.export import find

        banks.create(find(source.absolute()), bank.absolute(), base=base, bundle=bundle)
    echo(f"add policies: latent-control bank add {bank} NAME RUN")


@bank_app.command("add")
def bank_add(
    bank: Bank,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name in requests.")],
    run: PolicySource,
    alias: Annotated[str, typer.Option("--alias", help="What then means this version.")] = "latest",
    register: Annotated[
        str | None, typer.Option("--register", metavar="MODEL", help="Also register it in MLflow under MODEL.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="URI", help="MLflow's tracking URI; default: the run's own.")
    ] = None,
) -> None:
    """Add RUN's policy as the next version of NAME; a server of the bank answers with it at once."""
    with exit_on_error(USAGE):
        if register is None and store is not None:
            raise ValueError("--store needs --register MODEL")
        from pipeline.serving import bank as banks
        from pipeline.serving.export import find

        source = find(run.absolute())
        place = None if register is None else _store(source, store)
        if register is not None:
            from pipeline.serving.registry import require_names

            require_names(register, None)
        member = banks.add(bank.absolute(), name, source, alias=alias)
    echo(f"{member} is {name}@{alias}")
    if register is None or place is None:
        return
    with exit_on_error(FAILED):
        from pipeline.serving.registry import register_member

        done = register_member(bank.absolute(), member, register, store=place[0], experiment=place[1])
    echo(f"registered in {done.store}: {done.uri}")


@bank_app.command("list")
def bank_list(bank: Bank, as_json: AsJson = False) -> None:
    """List the policies of a bank: versions, aliases, lineage."""
    with exit_on_error(USAGE):
        from pipeline.serving import bank as banks

        index = banks.read_index(bank.absolute())
        records = {member: banks.read_record(bank.absolute(), member) for member in index.hashes()}
    if as_json:
        print_json({"members": records, "aliases": index.aliases, "banned": index.banned})
        return
    rows = [
        [member, " ".join(alias for alias, n in index.aliases.get(one["name"], {}).items() if n == one["version"])]
        + [str(one[key] or "") for key in ("run", "stage", "added")] + [one["sha256"][:12]]
        for member, one in records.items()
    ]  # fmt: skip
    print_table(str(bank), ["policy", "aliases", "run", "stage", "added", "hash"], rows)
    if index.banned:
        echo(f"banned codes: {', '.join(map(str, index.banned))}")


@bank_app.command("remove")
def bank_remove(bank: Bank, member: MemberName) -> None:
    """Remove one version, or all of a name; requests under way end as they began."""
    with exit_on_error(USAGE):
        from pipeline.serving import bank as banks

        echo(f"removed: {', '.join(banks.remove(bank.absolute(), member))}")


@bank_app.command("alias")
def bank_alias(
    bank: Bank,
    name: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS", help="For example concise@champion; NAME is NAME@latest.")
    ],
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A version, or another alias.")],
) -> None:
    """Point an alias at a version."""
    with exit_on_error(USAGE):
        from pipeline.serving import bank as banks

        own, _, alias = name.partition("@")
        alias = alias or banks.LATEST
        echo(f"{own}@{alias} is {banks.point(bank.absolute(), own, alias, version)}")


@bank_app.command("ban")
def bank_ban(
    bank: Bank,
    codes: Annotated[list[int] | None, typer.Argument(metavar="[CODES]...", help="None: ban no code.")] = None,
) -> None:
    """Ban these codes, and no others, for all policies of a bank."""
    with exit_on_error(USAGE):
        from pipeline.serving import bank as banks

        banks.ban(bank.absolute(), codes or [])
    echo(f"banned codes: {', '.join(map(str, codes or [])) or 'none'}")


@bank_app.command("take")
def bank_take(
    bank: Bank, member: MemberName, out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="New.")]
) -> None:
    """Write one policy as a checkpoint, for all other commands: steer, evaluate, search, export."""
    with exit_on_error(USAGE):
        from pipeline.serving import bank as banks

        echo(f"{banks.take(bank.absolute(), member, out.absolute())}: {out}")
