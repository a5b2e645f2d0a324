"""The verifier ``judge``: scores between 0 and 1 by a language model, with how much its verdicts on one response
disagree."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from configs.install import install_command
from rollout_workers.judges.answers import JudgeAnswers
from rollout_workers.judges.wording import NEEDED, TEMPLATES, filled, read_reply, schema, unmarked
from rollout_workers.judging.outcome import LONGEST, TypedFailure
from rollout_workers.tasks.protocol import Failure, Score
from rollout_workers.tasks.row_files import Row
from rollout_workers.tasks.scorer_options import Judge
from rollout_workers.tasks.verifiers import VERIFIERS

INSTALL = install_command("judge")


class Judged:
    """``Judged(Judge(base_url="http://127.0.0.1:8000/v1", model="judge"))``

    ``rubric``: the mean of ``votes`` scores. ``pairwise``: against the row's answer, asked in both orders (a judge that
    prefers a place says so by disagreeing); the mean of whether the response won, ties count half. With
    ``heldout_verifier`` that one alone says what a success is: a policy that only learns to please the judge shows.

    Raises:
        ValueError: a template lacks a place, a variable is not set, or a package is missing.
    """

    parts = ("success", "score", "disagreement", "judged")

    def __init__(self, settings: Judge) -> None:
        self.settings, self.template = settings, settings.template or TEMPLATES[settings.kind]
        for name in NEEDED[settings.kind]:
            if f"{{{name}}}" not in self.template:
                raise ValueError(
                    f"task.options.judge.template lacks {{{name}}}, which kind {settings.kind} needs; write it in"
                )
        if settings.key_variable is not None and settings.key_variable not in os.environ:
            raise ValueError(
                f"task.options.judge.key_variable: {settings.key_variable} is not set here; put the judge's key there"
            )
        if find_spec("openai") is None:
            raise ValueError(f"task.options.verifier judge needs the package openai, which is not installed; {INSTALL}")
        self.answers = JudgeAnswers(settings.cache)
        self._beside = None if settings.heldout_verifier is None else VERIFIERS[settings.heldout_verifier]

    def score(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Score | Failure]:
        """The judge's word on each text, ``parallel`` at once."""
        with ThreadPoolExecutor(self.settings.parallel) as threads:
            return list(threads.map(self._score, rows, texts))

    def _score(self, row: Row, text: str) -> Score | Failure:
        try:
            votes = self._votes(row, text)
        except TypedFailure as failure:
            return Failure(kind=failure.args[0], message=failure.args[1])
        score = sum(votes) / len(votes)
        judged = score >= self.settings.success_at
        success = judged if self._beside is None else self._beside(str(row["answer"]), text)
        parts = {"success": float(success), "score": score, "judged": float(judged)}
        return Score(reward=score, success=success, parts={**parts, "disagreement": max(votes) - min(votes)})

    def _votes(self, row: Row, text: str) -> list[float]:
        """Each of 0 to 1."""
        said = unmarked(text, self.settings.longest)
        values = {name: str(row.get(name) or "") for name in ("prompt", "answer")}
        values |= {"rubric": self.settings.rubric, "best": str(self.settings.best)}
        if self.settings.kind == "rubric":
            question = filled(self.template, {**values, "response": said})
            return [self._vote(question, vote) for vote in range(self.settings.votes)]
        if not values["answer"]:
            raise TypedFailure("judge_no_reference", "the row has no answer to compare with; give it one")
        reference = unmarked(values["answer"], self.settings.longest)
        found = []
        for vote in range(self.settings.votes):
            both = ({"first": said, "second": reference}, {"first": reference, "second": said})
            won, lost = (self._vote(filled(self.template, {**values, **pair}), vote) for pair in both)
            found += [won, 1.0 - lost]
        return found

    def _vote(self, question: str, vote: int) -> float:
        said = self._ask(question, vote)
        if (found := read_reply(self.settings.kind, said, self.settings.best)) is None:
            raise TypedFailure("judge_unreadable", f"the judge said {said[:LONGEST]!r}, which is not a verdict")
        return found

    def _ask(self, question: str, vote: int) -> str:
        """The judge's reply, from the cache where it was asked the same before."""
        body = self._body(question, vote)
        asked = hashlib.sha256(json.dumps(body, sort_keys=True).encode("utf-8", "replace")).hexdigest()
        if (known := self.answers.get(asked)) is not None:
            return known
        if not self.answers.spend(self.settings.budget):
            raise TypedFailure(
                "judge_budget", f"{self.settings.budget} requests are spent; raise task.options.judge.budget"
            )
        from openai import OpenAIError

        try:
            reply = self._client.chat.completions.create(**body)
        except OpenAIError as error:  # after its retries
            raise TypedFailure("judge_error", f"{type(error).__name__}: {error}"[:LONGEST]) from None
        said = (reply.choices[0].message.content if reply.choices else None) or ""
        self.answers.put(asked, said)
        return said

    def _body(self, question: str, vote: int) -> dict[str, Any]:
        settings = self.settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "seed": vote,
        }
        if settings.structured:
            wanted: Mapping[str, Any] = {"name": "verdict", "schema": schema(settings.kind, settings.best)}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return body

    @cached_property
    def _client(self) -> Any:
        """It tries again after connection errors, 408, 409, 429 and 5xx, with exponential back-off and the server's own
        Retry-After."""
        from openai import OpenAI

        settings = self.settings
        key = "none" if settings.key_variable is None else os.environ[settings.key_variable]
        return OpenAI(base_url=settings.base_url, api_key=key, max_retries=settings.retries, timeout=settings.seconds)
