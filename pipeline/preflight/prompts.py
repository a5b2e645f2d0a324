"""Prompts and training rows as the model will see them: all are made token ids before work starts, or a sample that is
named."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.checks import offline_sections, row_length
from configs.schema import DataSource, RunConfig, TaskConfig
from pipeline.preflight.chat_template import left_out, template_problem
from pipeline.preflight.problems import Findings
from pipeline.runs.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from pipeline.data.sources import Encoder
    from rollout_workers.tasks import Demonstration, Prompt, Task

SECONDS = 10.0
"""For the rows of one source, after which the rest is left out and counted."""
MADE = 500
"""Prompts of a task that a program makes: they are alike."""
SHOWN = 2000
"""Characters of the prompt that is shown."""
OWN_TOKENIZER = "take the tokenizer that came with the model, or resize the model (resize_token_embeddings) and save it"
SAMPLE_AGAIN = "make the file again by latent-control sample CONFIG"
FAILED = 100
"""Rows that cannot be encoded, after which no more are tried."""


@dataclass
class PromptReading:
    """Findings in the rows of one place: ``PromptReading(place="task", total=100, seen=100, longest=31, ...)``."""

    place: str
    total: int | None = None
    """``None``: rows of a stream, whose number nobody knows."""
    seen: int = 0
    longest: int = 0
    example: str = ""
    """The longest row's name."""
    lengths: list[int] = field(default_factory=list)
    unknown: int = 0
    tokens: int = 0
    largest: int = -1
    failed: list[str] = field(default_factory=list)
    different: set[tuple[int, ...]] = field(default_factory=set)

    def take(self, row: Any, encode: Callable[[Any], tuple[str, Sequence[int]]], unknown: int | None) -> None:
        """Count a row; ``encode`` gives its name and token ids, and its ``ValueError`` says what is wrong with it."""
        self.seen += 1
        try:
            name, ids = encode(row)
        except ValueError as error:
            self.failed.append(first_line(error))
            return
        if not len(ids):
            self.failed.append(f"{name}: it has no tokens")
            return
        self.tokens += len(ids)
        self.unknown += sum(int(token) == unknown for token in ids)
        self.largest = max(self.largest, *map(int, ids))
        if len(ids) > self.longest:
            self.longest, self.example = len(ids), name
        self.lengths.append(len(ids))
        if len(self.different) < 2:
            self.different.add(tuple(map(int, ids)))

    def problems(self, rows: int, what: str, remedy: str = OWN_TOKENIZER) -> Iterator[str]:
        """What no model with an embedding of ``rows`` rows can read; ``remedy``: for token ids beyond it."""
        if self.failed:
            more = f"{len(self.failed)} of {self.seen} {what}"
            yield f"{self.place}: {more} cannot be used; {self.failed[0]}"
        if self.largest >= rows:
            yield (
                f"{self.place}: {what} have the token id {self.largest}, but the base LM's are 0 to {rows - 1}; "
                f"{remedy}"
            )

    def warnings(self, token: str | None, what: str) -> Iterator[str]:
        """Words that the tokenizer lacks, and rows that were not looked at."""
        if self.unknown:
            yield (
                f"{self.place}: {self.unknown / self.tokens:.1%} of the tokens of {what} are {token}: the tokenizer "
                "does not know these words or characters, so the model cannot tell them apart; take another base LM"
            )
        if self.total is not None and self.seen < self.total:
            yield (
                f"{self.place}: {self.seen:,} of {self.total:,} {what} were read in {SECONDS:g} s; the other "
                f"{self.total - self.seen:,} were not looked at"
            )


def read(
    place: str, rows: Iterable[Any], encode: Callable[[Any], tuple[str, Sequence[int]]], unknown: int | None
) -> PromptReading:
    """``PromptReading.take`` of ``rows`` for ``SECONDS`` at most, those of a sequence in a seeded order."""
    some, deadline = rows if isinstance(rows, Sequence) else None, time.monotonic() + SECONDS
    found = PromptReading(place, total=None if some is None else len(some))
    if some is not None:
        rows = (some[index] for index in random.Random(0).sample(range(len(some)), len(some)))
    try:
        for row in rows:
            found.take(row, encode, unknown)
            if time.monotonic() > deadline or len(found.failed) >= FAILED:
                break
    except ValueError as error:  # of a stream itself: a broken line, a column that is not there
        found.failed.append(first_line(error))
    return found


@dataclass(frozen=True)
class Prompts:
    """The check: ``Prompts(config, model, tokenizer, build)``, ``model`` being the base LM's config."""

    config: RunConfig
    model: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    build: Callable[[TaskConfig], Task]

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return int(self.model.get_text_config().vocab_size)

    @property
    def positions(self) -> int:
        """Tokens up to which the base LM can read."""
        from latent_control.base_lm import positions_of

        return min(positions_of(self.model.get_text_config()))

    def template_problems(self, task: Task) -> Iterator[str]:
        """Of the chat template, for the first prompt."""
        from rollout_workers.tasks.encoding import messages_of

        chat, prompt = self.config.task.chat, task.prompts("heldout")[0]
        if problem := template_problem(self.tokenizer, messages_of(prompt), chat=chat):
            yield f"{'task.chat' if chat else 'base.model'}: {problem}"

    def problems(self, task: Task | None, findings: Findings) -> Iterator[str]:
        """Of the task's prompts (an environment's are its episodes) and of every row that a stage trains on."""
        from rollout_workers.tasks import EpisodeTask

        yield from self._ends()
        if task is not None and not isinstance(task, EpisodeTask):
            yield from self._prompts(task, findings)
        done = set()
        for name, source, length, own in self._sources():
            if task is None and source.kind == "task" and source.task is None:
                continue
            key = (source.model_dump_json(), length)
            if key not in done:
                done.add(key)
                yield from self._rows_of(name, source, length, own or task, findings.warnings)

    def _ends(self) -> Iterator[str]:
        """The end token that responses are trained with: there is none, or it lies beyond the embedding."""
        from latent_control.text import end_token

        try:
            end = end_token(self.tokenizer, chat=self.config.task.chat)
        except ValueError as error:
            yield f"task: {error}"
            return
        if end >= self.rows:
            yield (
                f"base.model: the end token {end} is beyond the {self.rows} rows of the embedding; take the "
                "tokenizer that came with the model"
            )

    def _prompts(self, task: Task, findings: Findings) -> Iterator[str]:
        from rollout_workers.tasks.dataset_rows import Rows

        said, usable = [], True
        read_by_split: dict[str, PromptReading] = {}
        for split in ("train", "heldout"):
            prompts = task.prompts(split)
            made = not isinstance(task, Rows) and len(prompts) > MADE
            chosen = [prompts[len(prompts) * i // MADE] for i in range(MADE)] if made else prompts
            found = read("task", chosen, self._encoded, self.tokenizer.unk_token_id)
            read_by_split[split] = found
            yield from found.problems(self.rows, f"{split} prompts")
            usable = usable and not found.failed
            findings.warnings.extend(found.warnings(self.tokenizer.unk_token, f"{split} prompts"))
            if len(found.different) == 1 and len({prompt.text for prompt in chosen[:8]}) > 1:
                yield (
                    "task: all prompts become the same tokens: the chat template or tokenizer leaves their texts out; "
                    "mend it, or set task.chat: false"
                )
            many = f"{found.seen:,} of {len(prompts):,}" if found.seen < len(prompts) else f"{found.seen:,}"
            said.append(f"{many} {split}, {min(found.lengths, default=0)} to {found.longest} tokens")
        yield from self._lengths(task, read_by_split)
        findings.notes.append(f"prompts   {'; '.join(said)}")
        if usable:
            findings.notes.extend(shown(task.prompts("heldout")[0], self.config, self.tokenizer))

    def _encoded(self, prompt: Prompt) -> tuple[str, list[int]]:
        from rollout_workers.tasks.encoding import encode_prompt, messages_of

        try:
            if not (prompt.text.strip() or prompt.turns):
                raise ValueError("it is empty; give it a text, or remove its row")
            ids = encode_prompt(self.tokenizer, prompt, chat=self.config.task.chat)
            if self.config.task.chat and (said := left_out(self.tokenizer, messages_of(prompt))):
                raise ValueError(f"the chat template {said}; mend it, or set task.chat: false")
            return prompt.id, ids
        except ValueError as error:
            raise ValueError(f"{prompt.id}: {first_line(error)}") from error

    def _lengths(self, task: Task, by_split: dict[str, PromptReading]) -> Iterator[str]:
        """Prompts that are too long for the config, or leave no room for a response."""
        limit, wanted = self.config.task.max_prompt_tokens, self.config.rollout.max_new_tokens
        found = max(by_split.values(), key=lambda reading: reading.longest)
        if found.longest > limit:
            many = {split: sum(length > limit for length in one.lengths) for split, one in by_split.items()}
            said = " and ".join(
                f"{many[split]} of {one.seen} {split}" for split, one in by_split.items() if many[split]
            )
            yield (
                f"task.max_prompt_tokens: {limit}, but {said} prompts of {task.name} have more, {found.example} has "
                f"{found.longest} tokens; set that many, fewer task.shots, or remove the longest rows"
            )
        if found.longest + wanted > self.positions:
            room = self.positions - found.longest
            remedy = f"set at most {room}" if room > 0 else "remove such prompts, or use a base LM with a longer window"
            yield (
                f"rollout.max_new_tokens: {wanted} after a prompt of {found.longest} tokens ({found.example}) passes "
                f"the window of {self.positions}; {remedy}"
            )

    def _sources(self) -> Iterator[tuple[str, DataSource, int, Task | None]]:
        """Place, source, longest row and the source's own task, of every stage that trains on rows."""
        for name, section in offline_sections(self.config):
            for index, source in enumerate(section.data):
                try:
                    own = None if source.task is None else self.build(source.task)
                except ValueError:  # source_problems says why
                    continue
                yield f"{name}.data[{index}]", source, row_length(self.config, section), own

    def _rows_of(
        self, name: str, source: DataSource, length: int, task: Task | None, warnings: list[str]
    ) -> Iterator[str]:
        """Of demonstrations, texts or rollouts that are trained on."""
        from pipeline.data.sources import Encoder
        from rollout_workers.tasks.dataset_rows import Rows
        from rollout_workers.tasks.sampled_ids import fingerprint, foreign

        sampled = task.sampled() if source.kind == "task" and isinstance(task, Rows) else []
        others = (ids.tokenizer for ids in sampled if ids.tokenizer != fingerprint(self.tokenizer))
        if theirs := next(others, None):
            warnings.append(f"{name}: {foreign(theirs, self.config.base.model)}")
        encoder = Encoder(tokenizer=self.tokenizer, chat=self.config.task.chat, max_length=length)
        found = read(name, rows_to_train(source, task, encoder), lambda row: _training_row(row, encoder),
                     self.tokenizer.unk_token_id)  # fmt: skip
        if not found.seen and not found.failed:
            found.failed.append("it gives no training rows; check its path, column and min_reward")
        yield from found.problems(self.rows, "rows to train on", SAMPLE_AGAIN if sampled else OWN_TOKENIZER)
        warnings += found.warnings(self.tokenizer.unk_token, "rows to train on")
        if found.longest > self.positions:
            yield (
                f"{name}: a row of {found.longest} tokens passes the window of {self.positions}; set "
                f"{name.partition('.data')[0]}.max_length to at most {self.positions}"
            )


def rows_to_train(source: DataSource, task: Task | None, encoder: Encoder) -> Iterable[Any]:
    """Demonstrations of both splits, or the token rows of texts and rollouts."""
    from itertools import chain

    from pipeline.data.sources import ReplaySource, TextSource
    from rollout_workers.tasks.dataset_rows import Rows

    if source.kind != "task":
        stream = (TextSource if source.kind == "text" else ReplaySource)(source, encoder, 0)
        return chain(stream.heldout(), stream.train(0))
    assert task is not None
    both = [task.demonstrations("train"), task.demonstrations("heldout")]
    most = max(map(len, both)) if isinstance(task, Rows) else MADE
    return _Joined([split[: min(len(split), most)] for split in both])


class _Joined(Sequence[Any]):
    """Sequences one after the other, their elements made when asked for."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def _training_row(row: Demonstration | Any, encoder: Encoder) -> tuple[str, Sequence[int]]:
    from rollout_workers.tasks import Demonstration

    if not isinstance(row, Demonstration):
        return "a row", row.ids
    return row.prompt.id, encoder.demonstration(row).ids


def shown(prompt: Prompt, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A prompt exactly as the model gets it: number of ids, and their text with special tokens, what is not printable
    escaped."""
    from rollout_workers.tasks.encoding import encode_prompt

    ids = encode_prompt(tokenizer, prompt, chat=config.task.chat)
    text = repr(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    cut = "" if len(text) <= SHOWN else f" ... ({len(text) - SHOWN:,} more characters)"
    yield f"prompt    {prompt.id}, {len(ids)} tokens, as the model sees it:"
    yield f"  {text[:SHOWN]}{cut}"
