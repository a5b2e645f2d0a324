"""Command ``steer``. Nothing heavy is imported before it runs."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson
from pipeline.cli.output import echo, print_json
from pipeline.cli.session import existing, exit_on_error

if TYPE_CHECKING:
    from pipeline.steering.request import SteeringRequest
    from pipeline.steering.steerer import Steerer

LOOPBACK = "127.0.0.1"


Codes = Annotated[
    str | None, typer.Option("--codes", help="Forced from the first token on, e.g. 3,_,17 (_: the policy's).")
]
Allowed = Annotated[
    str | None, typer.Option("--allow", metavar="CODES", help="Only these in the whole answer, e.g. 3,5,10-15.")
]
Forbidden = Annotated[str | None, typer.Option("--forbid", metavar="CODES", help="None of these in the whole answer.")]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0.0, help="Sample codes; 0 is greedy.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, max=1024, help="New tokens; default: the run's.")]
Why = Annotated[
    int | None,
    typer.Option("--why", min=0, metavar="T", help="With --prompt: also the top tokens of every code at token T."),
]
BaseAnswer = Annotated[bool, typer.Option("--base-answer", help="With --prompt: also the base LM's own answer.")]
Host = Annotated[
    str | None, typer.Option("--host", help=f"Address of the page; default {LOOPBACK}, this machine only.")
]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Default: 8080, or the next free one.")]
MovedBase = Annotated[
    str | None, typer.Option("--base", help="Where the base LM lies now, if it moved since training.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; default: the run's cluster.learner_threads.")
]
Target = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run (its last policy), RUN/checkpoints/STAGE, or an export.")
]
Terminal = Annotated[
    bool, typer.Option("--terminal", help="On the terminal instead of a page; also taken when input is piped.")
]


@app.command()
def steer(
    target: Target,
    terminal: Terminal = False,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="One answer, then done.")] = None,
    codes: Codes = None,
    allow: Allowed = None,
    forbid: Forbidden = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest codes (the default).")] = False,
    temperature: Temperature = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Sample among the K most likely codes.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampling.")] = 0,
    max_tokens: MaxTokens = None,
    why: Why = None,
    compare: BaseAnswer = False,
    host: Host = None,
    port: Port = None,
    web: Annotated[bool, typer.Option("--web", help="The page, even where input is not a terminal.")] = False,
    base: MovedBase = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: a GPU if there is one.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Steer RUN's policy by hand: force or forbid codes, see each code's top tokens, continue from any token. A local
    page, or --terminal."""
    served = web or host is not None or port is not None
    talks = terminal or (prompt is None and not served and not sys.stdin.isatty())
    with exit_on_error(USAGE):
        _one_way(
            served=served,
            terminal=terminal,
            prompt=prompt,
            temperature=temperature,
            greedy=greedy,
            only_once=why is not None or compare,
        )
        session = _session(prompt, codes, allow, forbid, 0.0 if greedy else temperature or 0.0, top_k, seed, max_tokens)
        if prompt is None and not talks:
            _nothing_decided(session)
        with redirect_stdout(sys.stderr):
            steerer = _open(target.absolute(), base, device, threads)
    if prompt is not None:
        _once(steerer, session, why, compare, as_json)
    elif talks:
        _talk(steerer, session, as_json)
    else:
        _serve(steerer, host or LOOPBACK, port)


def _one_way(
    *, served: bool, terminal: bool, prompt: str | None, temperature: float | None, greedy: bool, only_once: bool
) -> None:
    """``ValueError`` for options that contradict each other."""
    if served and (terminal or prompt is not None):
        raise ValueError(
            f"--host, --port and --web are about the page, {'--terminal' if terminal else '--prompt'} is about no "
            "page: leave out one"
        )
    if terminal and prompt is not None:
        raise ValueError("--prompt gives one answer, --terminal is for many: leave out one")
    if greedy and temperature:
        raise ValueError(f"--greedy and --temperature {temperature:g} contradict each other: leave out one")
    if only_once and prompt is None:
        raise ValueError("--why and --base-answer go with --prompt TEXT; on the terminal they are :why T and :base")


def _nothing_decided(session: SteeringRequest) -> None:
    """``ValueError`` for options that the page would ignore: there they are its own fields."""
    from pipeline.steering.request import SteeringRequest

    if session != SteeringRequest.model_validate({"prompt": ""}):
        raise ValueError(
            "codes, sampling and lengths are chosen on the page itself: leave them out, or add --prompt "
            "TEXT or --terminal"
        )


def _session(
    prompt: str | None,
    codes: str | None,
    allow: str | None,
    forbid: str | None,
    temperature: float,
    top_k: int | None,
    seed: int,
    max_tokens: int | None,
) -> SteeringRequest:
    from pipeline.steering.request import SteeringRequest, codes_of, plain_codes
    from pipeline.steering.terminal import sentence

    try:
        return SteeringRequest(
            prompt=prompt or "",
            codes=codes_of(codes, "--codes", gaps=True) if codes is not None else [],
            allowed_codes=plain_codes(allow, "--allow") if allow is not None else None,
            forbidden_codes=plain_codes(forbid, "--forbid") if forbid is not None else [],
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
    except ValueError as error:
        raise ValueError(sentence(error)) from error


def _open(target: Path, base: str | None, device: str | None, threads: int | None) -> Steerer:
    existing(target)
    import torch

    from pipeline.steering.loading import load
    from pipeline.steering.steerer import Steerer

    if device is not None and device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device!r}: give cpu or cuda")
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {device}, but torch sees no GPU: give cpu, or leave it out")
    loaded = load(target, base=base, device=device)
    if threads or loaded.config:
        torch.set_num_threads(threads or loaded.config.cluster.learner_threads)  # type: ignore[union-attr]
    return Steerer(loaded)


def _once(steerer: Steerer, session: SteeringRequest, place: int | None, compare: bool, as_json: bool) -> None:
    """One answer. What is wrong with it is the user's: exit code 2."""
    from rich.console import Console

    from pipeline.pages.records import as_data
    from pipeline.steering.terminal import answer_data
    from pipeline.steering.terminal_view import answer_lines, candidate_lines

    with exit_on_error(USAGE):
        answer = steerer.answer(session)
        found = None if place is None else steerer.candidates(session, place)
    other = steerer.base(session) if compare else None
    name = "steered" if session.steered else "policy"
    if as_json:
        whole = answer_data(session, answer, name)
        more = {
            "candidates": None if found is None else as_data(found),
            "base": None if other is None else as_data(other),
        }
        print_json(whole | {key: value for key, value in more.items() if value is not None})
        return
    console = Console()
    lines = answer_lines(answer, name, console.width)
    if found is not None:
        lines += candidate_lines(found, answer.tokens[found.place].text)
    lines += [] if other is None else answer_lines(other, "base LM", console.width)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _talk(steerer: Steerer, session: SteeringRequest, as_json: bool) -> None:
    """Commands and prompts until they end. On a pipe the exit code is 1 when a line could not be done."""
    from rich.console import Console
    from rich.text import Text

    from pipeline.steering.terminal import Terminal, piped, typed

    console = Console()
    talk = Terminal(steerer, session, console, as_json=as_json)
    if sys.stdin.isatty():
        loaded = steerer.loaded
        about = (
            f"{loaded.name}: {loaded.limits.num_actions} codes. {loaded.note or 'Type a prompt, or :prompt 0.'} :help "
            "lists the commands."
        )
        talk.say(Text(about, style="dim"))
        talk.run(typed(console))
    elif talk.run(piped()):
        raise typer.Exit(FAILED)


def _serve(steerer: Steerer, host: str, port: int | None) -> None:
    from pipeline.steering.web import application
    from pipeline.web.guard import new_token
    from pipeline.web.server import listen, serve

    with exit_on_error(USAGE):
        listener = listen(host, port)
    with exit_on_error(FAILED), listener:
        token = new_token()
        serve("steering page", application(steerer, host, token), listener, token, echo)
