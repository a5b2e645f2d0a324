"""``steer`` on a terminal, or on a pipe: a line is a prompt, or a command that begins with a colon."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from pipeline.console.displays import harmless
from pipeline.pages.records import as_data
from pipeline.steering.records import SteeringAnswer
from pipeline.steering.request import SteeringRequest, codes_of, plain_codes
from pipeline.steering.steerer import Steerer
from pipeline.steering.terminal_view import answer_lines, candidate_lines, printable

HELP = """a line of text         a new prompt
:prompt [N]            held-out prompts of the task; take the one with number N
:at T CODE             force CODE at token T; what is before stays, the rest is generated again
:not T CODES           forbid CODES at token T, and go on from there
:from T                let the policy choose again from token T on
:force CODE            one code for the whole answer; :force 3,_,17 codes from the first token on (_: the policy's)
:only CODES            only these in the whole answer, e.g. 3,5,10-15
:forbid CODES          none of these in the whole answer
:free                  reset all steering
:why T                 the top token of every code at token T
:base                  the base LM's own answer
:greedy                take the likeliest codes; :temperature X samples, :seed N with another seed, :top-k K among fewer
:tokens N              at most N new tokens
:again                 repeat the answer
:json                  answers as JSON, a line each; again: as text
:help, :quit"""
PROMPTS_LISTED = 20


class Terminal:
    """One session; ``run`` reads lines until they end or ``:quit``."""

    def __init__(self, steerer: Steerer, session: SteeringRequest, console: Console, *, as_json: bool = False) -> None:
        self.steerer, self.session, self.console, self.as_json = steerer, session, console, as_json
        self.answer: SteeringAnswer | None = None
        self.commands: dict[str, Callable[[str], None]] = {
            "at": self._at,
            "not": self._not,
            "from": self._from,
            "force": self._force,
            "only": lambda text: self._under(allowed_codes=plain_codes(text, ":only")),
            "forbid": lambda text: self._under(forbidden_codes=plain_codes(text, ":forbid")),
            "free": lambda _: self._decide(self.session.free()),
            "why": self._why,
            "base": self._base,
            "prompt": self._prompt,
            "greedy": lambda _: self._decide(self.session.but(temperature=0.0)),
            "temperature": lambda text: self._decide(self.session.but(temperature=number(text, ":temperature", float))),
            "seed": lambda text: self._decide(self.session.but(seed=number(text, ":seed", int))),
            "top-k": lambda text: self._decide(self.session.but(top_k=number(text, ":top-k", int))),
            "tokens": lambda text: self._decide(self.session.but(max_tokens=number(text, ":tokens", int))),
            "again": lambda _: self._decide(self.session),
            "json": self._json,
            "help": lambda _: self.say(Text(HELP)),
        }

    def run(self, lines: Iterable[str]) -> int:
        """Do what each line says; how many could not be done."""
        failed = 0
        for line in lines:
            words = line.strip()
            if words in (":quit", ":q", ":exit"):
                break
            if not words:
                continue
            try:
                self.do(words)
            except ValueError as error:
                failed += 1
                self.say(Text(f"error: {sentence(error)}", style="red"))
        return failed

    def do(self, line: str) -> None:
        """One line; ``ValueError`` says what is wrong with it."""
        if not line.startswith(":"):
            # Another prompt: what was decided for single tokens of the old one's answer goes.
            self._decide(self.session.but(prompt=line.replace("\\n", "\n"), codes=[], forbidden_at={}))
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            raise ValueError(f"there is no command :{name}; :help lists them")
        self.commands[name](rest.strip())

    def say(self, text: Text) -> None:
        """A line to the screen; never broken, so that it can be copied."""
        self.console.print(harmless(text), soft_wrap=True, highlight=False)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _decide(self, wanted: SteeringRequest) -> None:
        """Show the answer to ``wanted``; it becomes the session's if it can be fulfilled."""
        if not wanted.prompt:
            self.session = wanted
            self.say(Text("type a prompt, or :prompt 0 for one of the task's", style="dim"))
            return
        self.answer = self.steerer.answer(wanted)
        self.session = wanted
        self._show(self.answer, "steered" if wanted.steered else "policy")

    def _under(self, **rules: Any) -> None:
        """Under other rules, codes that were only kept may not hold."""
        self._decide(self.session.but(codes=[], **rules))

    def _show(self, answer: SteeringAnswer, name: str) -> None:
        if self.as_json:
            # To the pipe as it is: rich would wrap or colour it.
            self.console.file.write(json.dumps(answer_data(self.session, answer, name), ensure_ascii=True) + "\n")
            self.console.file.flush()
            return
        for line in answer_lines(answer, name, self.console.width):
            self.say(line)

    def _shown(self, place: int) -> list[int]:
        """The codes of the answer on the screen."""
        if self.answer is None:
            raise ValueError("there is no answer yet: type a prompt first")
        if not 0 <= place < len(self.answer.tokens):
            raise ValueError(f"there is no token {place}: the answer has tokens 0 to {len(self.answer.tokens) - 1}")
        return [token.code for token in self.answer.tokens if token.code is not None]

    def _at(self, text: str) -> None:
        place, code = pair(text, ":at")
        self._decide(self.session.go_on(place, [*self._shown(place)[:place], number(code, ":at", int)]))

    def _not(self, text: str) -> None:
        place, codes = pair(text, ":not")
        self._decide(self.session.go_on(place, self._shown(place)[:place], plain_codes(codes, ":not")))

    def _from(self, text: str) -> None:
        place = number(text, ":from", int)
        self._decide(self.session.go_on(place, self._shown(place)[:place]))

    def _force(self, text: str) -> None:
        codes = codes_of(text, ":force", gaps=True)
        if not codes:
            raise ValueError(":force needs a code, e.g. :force 3 or :force 3,_,17")
        if len(codes) == 1 and codes[0] is not None and "," not in text:
            self._under(allowed_codes=codes)
        else:
            self._decide(self.session.but(codes=codes))

    def _why(self, text: str) -> None:
        place = number(text, ":why", int)
        self._shown(place)
        assert self.answer is not None
        found = self.steerer.candidates(self.session, place)
        if self.as_json:
            self.console.file.write(json.dumps(as_data(found)) + "\n")
            return
        for line in candidate_lines(found, self.answer.tokens[place].text):
            self.say(line)

    def _base(self, _: str) -> None:
        if not self.session.prompt:
            raise ValueError("there is no prompt yet: type one first")
        self._show(self.steerer.base(self.session), "base LM")

    def _prompt(self, text: str) -> None:
        known = self.steerer.loaded.prompts
        if not known:
            raise ValueError(self.steerer.loaded.note or "the task has no held-out prompts")
        if not text:
            for place, prompt in enumerate(known[:PROMPTS_LISTED]):
                self.say(Text(f"{place:3d}  {printable(prompt.text[-100:])}"))
            return
        place = number(text, ":prompt", int)
        if place >= len(known):
            raise ValueError(f":prompt {place}: numbers go from 0 to {len(known) - 1}")
        self._decide(self.session.but(prompt=known[place].text, codes=[], forbidden_at={}))

    def _json(self, _: str) -> None:
        self.as_json = not self.as_json


def answer_data(session: SteeringRequest, answer: SteeringAnswer, name: str) -> dict[str, Any]:
    """An answer as JSON: who wrote it, the request that leads to it again, text, tokens with codes, and the verdict."""
    return {"by": name, "wish": session.model_dump(mode="json"), **as_data(answer)}


def sentence(error: ValueError) -> str:
    """An error in one line; of several of pydantic's, the first."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{first['loc'][0]}: {first['msg']}, got {first['input']!r:.80}"
    return str(error)


def number(text: str, what: str, kind: Callable[[str], Any]) -> Any:
    """A number that a command needs, not negative."""
    try:
        found = kind(text)
    except ValueError:
        found = -1
    if not 0 <= found < 2**63:
        raise ValueError(f"{what} needs a number, got {text[:40]!r}")
    return found


def pair(text: str, what: str) -> tuple[int, str]:
    """A token's place and what is to happen there."""
    place, _, rest = text.partition(" ")
    if not rest.strip():
        raise ValueError(f"{what} needs the number of a token and a code, e.g. {what} 4 17")
    return number(place, what, int), rest.strip()


def typed(console: Console) -> Iterator[str]:
    """Lines that a reader types, with history where the platform has it."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history for input())
    while True:
        try:
            yield input("> ")
        except EOFError:
            console.print()
            return


def piped() -> Iterator[str]:
    """Lines of standard input."""
    yield from sys.stdin
