"""The policy bank: what many policies in one batch cost, in memory, decoding and serving, and what is saved by training
them together.

    python benchmarks/bank.py [--parts decode serve train] [--policies 16] [--updates 100] [--rounds 1]
        [--repeats 5] [--quick] [--out DIR]

``decode``: tokens per second of processor time (one thread) of the engine on the tiny base LM (64 codes) when the rows
of a batch belong to 1, 8, 32 or 256 policies, in turn, over the plain engine with one policy in the same round. 512
prompts of 24 tokens, 256 rows at once (and 2048 prompts, 1024 rows), mixed lengths (mean 16, cut to 4..48), for three
sizes of policy; the same on SmolLM2, 256 prompts of 4 tokens, 4 to 8 new ones; bytes
held for each further policy over its own bytes.
``serve``: 32 policies on Ray Serve, 8 clients that ask one after the other through the ``openai`` client, names in turn
against one name in the same round: median and 95th percentile of the time to an answer; then the seconds from the call
of ``bank add`` to the new policy's first answer under that load, and failed requests.
``train``: seconds of ``latent-control bank train`` for K policies of U updates (8 x 8 rollouts of countdown, different
rewards) on one finished bank, and of K times ``latent-control run`` with the same settings, one after another; whole
commands, Ray's start-ups included, in turn, after no warm-up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, arguments, ratio, report, spread
from models import DTYPE, base_folder

from latent_control import LatentActionLM
from latent_control.decoding.generate import generate
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.model import latent_actor
from latent_control.policies.bank import PolicyBank
from latent_control.policies.mlp import MlpPolicy
from latent_control.pretrained import with_policy
from pipeline.bank.tasks import sections_of
from pipeline.serving import bank as banks
from pipeline.serving.export import Source

SIZES = ((256, 2), (128, 1), (64, 1))
"""Width and layers of the policies"""
MEMBERS, BATCH = (1, 8, 32, 256), 256
SERVED, CLIENTS = 32, 8


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What is decoded: ``rows`` prompts of ``prompt`` tokens, ``batch`` rows at once, 4 to ``longest`` new tokens."""

    base: str = "tiny"
    sizes: tuple[tuple[int, int], ...] = SIZES
    members: tuple[int, ...] = MEMBERS
    batch: int = BATCH
    rows: int = 2 * BATCH
    prompt: int = 24
    longest: int = 48


CASES = (
    Decoded(),
    Decoded(sizes=SIZES[:2], members=(256,), batch=4 * BATCH, rows=8 * BATCH),
    Decoded(base="smollm2", sizes=SIZES[:1], rows=BATCH, prompt=4, longest=8),
)
QUICK = (Decoded(sizes=SIZES[2:], members=(1, 3), batch=4, rows=8),)


def model_of(width: int, layers: int, base: str = "tiny") -> LatentActionLM:
    """64 random codes that matter and an ``mlp`` policy."""
    shape: dict[str, Any] = {"policy_kind": "mlp", "policy_width": width, "policy_layers": layers}
    model = LatentActionLM.from_base(
        base_folder(base), dtype=DTYPE[base], num_actions=64, seed=0, inverse_dynamics_layers=2, merge_layers=2, **shape
    )
    generator = torch.Generator().manual_seed(0)
    for weight in model.merge.parameters():
        torch.nn.init.normal_(weight, std=0.02, generator=generator)
    return model.eval()


def policy_weights(like: MlpPolicy, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in like.state_dict().items()}


def decoding(case: Decoded, repeats: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row of the table and its raw numbers for each size of policy and number of members."""
    lengths = np.random.default_rng(0).geometric(3 / case.longest, case.rows).clip(4, case.longest).tolist()
    for width, layers in case.sizes:
        model = model_of(width, layers, case.base)
        assert isinstance(model.policy, MlpPolicy)
        bank, own = PolicyBank(model.policy), sum(tensor.nbytes for tensor in model.policy.state_dict().values())
        for number in range(max(case.members)):
            bank.put(str(number), policy_weights(model.policy, number))
        held = sum(buffer.untyped_storage().nbytes() for buffer in bank.network.buffers()) / max(case.members) / own
        prompts = torch.randint(4, model.base.lm.config.vocab_size, (case.rows, case.prompt))

        def side(count: int | None, model: Any = model, bank: Any = bank, prompts: Any = prompts) -> float:
            blends = None if count is None else [bank.blend(str(row % count)) for row in range(case.rows)]
            params = SamplingParams(
                max_new_tokens=lengths, batch_size=case.batch, seed=0, stop_token=-1, members=blends
            )
            started = time.process_time()
            generate(model.base, latent_actor(model, bank), params, prompts)
            return sum(lengths) / (time.process_time() - started)

        sides: dict[str, Callable[[], float]] = {"plain": lambda side=side: side(None)}
        sides |= {str(count): lambda side=side, count=count: side(count) for count in case.members}
        measured = alternate(sides, repeats)
        for count in case.members:
            found = ratio(measured[str(count)], measured["plain"])
            row = {
                "base": case.base,
                "policy": f"{width} wide, {layers} layers, {own / 1e6:.2f} MB",
                "rows at once": case.batch,
                "policies": count,
                "tokens/s": spread(measured[str(count)]),
                "over one policy": f"{found['median']:.2f} ({found['min']:.2f} - {found['max']:.2f})",
                "bytes / own": round(held, 3),
            }
            about = {"base": case.base, "width": width, "layers": layers, "batch": case.batch, "policies": count}
            yield row, about | {"ratio": found} | measured


# -- serving -----------------------------------------------------------------------------------------------------------


def made_bank(folder: Path, count: int) -> tuple[Path, list[Source]]:
    """A bank of ``count`` random policies, and two more checkpoints to add."""
    model = model_of(256, 2)
    assert isinstance(model.policy, MlpPolicy)
    world, sources = model.save_pretrained(folder / "world"), []
    for number in range(count + 2):
        weights = {name: tensor.numpy() for name, tensor in policy_weights(model.policy, number).items()}
        with_policy(world, folder / f"policy{number}", weights)
        sources.append(Source(checkpoint=folder / f"policy{number}", run_dir=None))
    bank = banks.create(Source(checkpoint=world, run_dir=None), folder / "bank")
    for number in range(count):
        banks.add(bank, f"p{number}", sources[number])
    return bank, sources[count:]


@contextlib.contextmanager
def served(bank: Path) -> Iterator[Any]:
    """An ``openai`` client of the served bank."""
    import openai

    from pipeline.serving import deploy

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = dataclasses.replace(deploy.ServingSettings(folder=bank, name="bank"), port=port)
    deploy.check(settings)
    with deploy.running(settings) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def load(
    client: Any, names: list[str], requests: int, during: Callable[[], None] = lambda: None
) -> tuple[list[float], int]:
    """Seconds of each request of ``CLIENTS`` clients, and how many failed; ``during`` runs meanwhile."""
    import openai

    seconds: list[float] = []
    failed = 0
    turns, prompts = itertools.cycle(names), np.random.default_rng(0).integers(1, 99, (CLIENTS, requests, 4))

    def ask(place: int) -> None:
        nonlocal failed
        for number in range(requests):
            started, prompt = time.perf_counter(), " ".join(map(str, prompts[place, number]))
            try:
                client.completions.create(model=next(turns), prompt=prompt, max_tokens=24, temperature=1.0, seed=number)
            except openai.OpenAIError:
                failed += 1
            seconds.append(time.perf_counter() - started)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(CLIENTS)]
    for thread in threads:
        thread.start()
    during()
    for thread in threads:
        thread.join()
    return seconds, failed


def serving(count: int, requests: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and the raw numbers."""
    with tempfile.TemporaryDirectory() as folder:
        bank, more = made_bank(Path(folder), count)
        with served(bank) as client:
            percentiles: dict[str, dict[str, list[float]]] = {"p50": {}, "p95": {}}
            every = [f"p{number}" for number in range(count)]

            def side(names: list[str], key: str) -> float:
                seconds, failed = load(client, names, requests)
                assert not failed
                for name, share in (("p50", 50), ("p95", 95)):
                    percentiles[name].setdefault(key, []).append(float(np.percentile(seconds, share)))
                return float(np.mean(seconds))

            alternate({"one": lambda: side(["p0"], "one"), "many": lambda: side(every, "many")}, repeats)
            percentiles = {name: {key: got[1:] for key, got in each.items()} for name, each in percentiles.items()}
            added: list[float] = []

            def add() -> None:
                for number, source in enumerate(more):
                    time.sleep(0.5)
                    started = time.perf_counter()
                    banks.add(bank, f"new{number}", source)
                    client.completions.create(model=f"new{number}", prompt="3 5", max_tokens=1)
                    added.append(time.perf_counter() - started)

            _, failed = load(client, every, 2 * requests, add)
    rows = []
    for name, each in percentiles.items():
        found = ratio(each["many"], each["one"])
        rows.append(
            {
                "served": f"{name} of {CLIENTS} clients, seconds",
                "one policy": spread(each["one"]),
                f"{count} policies": spread(each["many"]),
                "ratio": f"{found['median']:.2f} ({found['min']:.2f} - {found['max']:.2f})",
            }
        )
    return rows, {
        "rows": rows,
        "percentiles": percentiles,
        "seconds_until_added_answers": added,
        "failed_requests": failed,
    }


# -- training ----------------------------------------------------------------------------------------------------------


def task_files(folder: Path, policies: int, updates: int, prompts: int) -> list[Path]:
    """A task file for each policy; JSON is YAML."""
    files = []
    for number in range(policies):
        task = {
            "seed": number,
            "reward": {"weights": {"success": 1.0, "format": 0.1 * (number % 10), "length": 0.01 * number}},
            "improve": {"updates": updates, "prompts_per_update": prompts, "epochs": 2, "learning_rate": 2e-4},
            "rollout": {"num_workers": 2, "max_new_tokens": 16, "batch_size": 256},
            "cluster": {"learner_threads": 1},
            "tracking": {"enabled": False},
        }
        files.append(folder / f"p{number}.yaml")
        files[-1].write_text(json.dumps(task))
    return files


def command(*words: Any) -> None:
    """A command of this project, to its end."""
    subprocess.run([sys.executable, "-m", "pipeline", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def training(policies: int, updates: int, prompts: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of the table, and the raw numbers."""
    with tempfile.TemporaryDirectory() as name:
        folder, rounds = Path(name), itertools.count()
        bank, _ = made_bank(folder, 0)
        files = task_files(folder, policies, updates, prompts)

        def together() -> float:
            place = folder / f"together{next(rounds)}"
            shutil.copytree(bank, place / "bank")
            started = time.perf_counter()
            command("bank", "train", place / "bank", *files, "--out", place / "runs", "--quiet")
            return time.perf_counter() - started

        def after_another() -> float:
            place = folder / f"alone{next(rounds)}"
            configs = []
            for file in files:
                alone = json.loads(file.read_text()) | sections_of(bank)
                alone |= {"explorer": {"enabled": False}, "report": {"enabled": False}}
                configs.append(place.with_name(f"{place.name}-{file.name}"))
                configs[-1].write_text(json.dumps(alone))
            started = time.perf_counter()
            for config in configs:
                command("run", config, "--run-dir", place / config.stem, "--quiet")
            return time.perf_counter() - started

        measured: dict[str, list[float]] = {"together": [], "after another": []}
        for number in range(repeats):
            for side in (together, after_another)[:: -1 if number % 2 else 1]:
                measured["together" if side is together else "after another"].append(side())
    found = ratio(measured["after another"], measured["together"])
    row = {
        "trained": f"{policies} policies, {updates} updates of {prompts} x 8 rollouts, seconds",
        "together": spread(measured["together"]),
        "one after another": spread(measured["after another"]),
        "times as fast": f"{found['median']:.2f} ({found['min']:.2f} - {found['max']:.2f})",
    }
    return row, {"policies": policies, "updates": updates, "prompts": prompts, "ratio": found} | measured


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("decode", "serve", "train"), default=["decode", "serve"])
    parser.add_argument("--policies", type=int, default=16, help="trained together")
    parser.add_argument("--updates", type=int, default=100, help="of each")
    parser.add_argument("--rounds", type=int, default=1, help="of training, both sides in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data: dict[str, Any] = {"served": None, "decoding": [], "training": None}
    rows: list[dict[str, Any]] = []
    if "train" in options.parts:
        sizes = (2, 1, 2) if options.quick else (options.policies, options.updates, 8)
        row, data["training"] = training(*sizes, 1 if options.quick else options.rounds)
        rows = [row]
        print(row, flush=True)
    if "serve" in options.parts:
        served_rows, data["served"] = serving(*((3, 2) if options.quick else (SERVED, 12)), options.repeats)
        rows = served_rows
        print(*served_rows, data["served"], sep="\n")
    if "decode" in options.parts:
        rows = []
        for case in QUICK if options.quick else CASES:
            for row, raw in decoding(case, options.repeats):
                rows.append(row)
                data["decoding"].append(raw)
                print(row, flush=True)
    report("bank", rows, data, options.out)


if __name__ == "__main__":
    main()
