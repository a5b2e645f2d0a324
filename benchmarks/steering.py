"""Does steering do what the explorer's page foretold?

    python benchmarks/steering.py --runs RUN_DIR ...     runs whose explorer.html is written

For every explained choice on a run's page: each code listed there, forced at that token (the codes before it as they
were) through what ``latent-control steer`` answers with, must write the token the page says; and each ending listed
there must come out token by token, with the reward it was given, the policy choosing greedily after the forced code.
What steering itself foretells at the choice (its candidates) is held against the page too. Texts of tokens are
compared, as the page holds no numbers of tokens. One process, no Ray.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, report

from pipeline.pages.explorer.why import prompt_of
from pipeline.replay.reader import ReplayReader
from pipeline.steering.loading import load
from pipeline.steering.request import SteeringRequest
from pipeline.steering.steerer import Steerer

COLUMNS = ("rollout_id", "prompt_id", "prompt_text", "tokens", "actions")


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """One thing the page says of a code at a choice."""

    kind: str
    """"token" (it would write this one) or "ending" (and then it would end so)"""
    place: int
    code: int
    texts: tuple[str, ...]
    reward: float | None


def page_data(page: Path) -> dict[str, Any]:
    """What is embedded in an explorer's page, of its first run."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), flags=re.DOTALL)
    assert found is not None, f"{page} is no explorer's page"
    data: dict[str, Any] = json.loads(found[1])["runs"][0]
    return data


def foretold(why: dict[str, Any], words: list[str]) -> Iterator[Foretold]:
    """All that the page says of a rollout's choices."""
    for step in why["steps"]:
        for option in step["options"]:
            yield Foretold(
                kind="token", place=step["position"], code=option["code"], texts=(words[option["token"]],), reward=None
            )
        for ending in step["endings"]:
            texts = tuple(words[token] for token in ending["tokens"])
            yield Foretold(
                kind="ending", place=step["position"], code=ending["code"], texts=texts, reward=ending["reward"]
            )


def agreement(steerer: Steerer, data: dict[str, Any], rollouts: dict[str, Any]) -> tuple[Counter[str], list[str]]:
    """How often steering did as foretold, by kind (``token``, ``token agreed``, ...), and what it did otherwise."""
    counts, misses = Counter[str](), list[str]()
    for why in data["why"]:
        rollout = rollouts[data["rollouts"][why["rollout"]]["id"]]
        prompt = prompt_of(steerer.loaded.task, rollout["prompt_id"], rollout["prompt_text"])
        before = [int(code) for code in rollout["actions"]]
        counts["choices"] += len(why["steps"])
        for told in foretold(why, data["vocabulary"]):
            wish = SteeringRequest(prompt=rollout["prompt_text"], codes=[*before[: told.place], told.code])
            answer = steerer.answer(wish)
            after = answer.tokens[told.place :]
            kept = [token.id for token in answer.tokens[: told.place]] == [
                int(token) for token in rollout["tokens"][: told.place]
            ]
            texts = tuple(token.text for token in after[: 1 if told.kind == "token" else None])
            verdict = steerer.verdict(prompt, [token.id for token in answer.tokens]) if told.kind == "ending" else None
            same = kept and texts == told.texts and (verdict is None or verdict.reward == told.reward)
            counts[told.kind] += 1
            counts[f"{told.kind} agreed"] += same
            if not same:
                misses.append(
                    f"{rollout['rollout_id']} token {told.place} code {told.code} {told.kind}: {told.texts} but "
                    f"{texts}, kept {kept}"
                )
            if told.kind == "token":
                rows = {row.code: row.text for row in steerer.candidates(wish, told.place).codes}
                counts["candidate"] += 1
                counts["candidate agreed"] += rows[told.code] == texts[0]
    return counts, misses


def row_of(name: str, counts: Counter[str]) -> dict[str, Any]:
    """A run as a row of the table."""
    parts = {kind: f"{counts[f'{kind} agreed']} / {counts[kind]}" for kind in ("token", "ending", "candidate")}
    share = sum(counts[f"{kind} agreed"] for kind in parts) / max(1, sum(counts[kind] for kind in parts))
    return {
        "run": name,
        "choices": counts["choices"],
        "token as the page foretold": parts["token"],
        "ending and reward as the page foretold": parts["ending"],
        "token as steering's candidates foretold": parts["candidate"],
        "agreement": f"{100 * share:.2f} %",
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    rows, misses = [], []
    for run in options.runs:
        steerer = Steerer(load(run.absolute(), device=options.device))
        rollouts = {row["rollout_id"]: row for row in ReplayReader(run, shuffle=False, columns=COLUMNS).rows()}
        data = page_data(run / "explorer.html")
        if options.quick:
            data["why"] = data["why"][:1]
        counts, missed = agreement(steerer, data, rollouts)
        rows.append(row_of(run.name, counts))
        misses += missed
    report("steering", rows, {"misses": misses, "device": options.device}, options.out)


if __name__ == "__main__":
    main()
