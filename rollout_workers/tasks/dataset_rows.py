"""Rows of one's own as a task: files (``rows``; ``jsonl`` and ``parquet`` are the same), or a Hugging Face
``dataset``, with a prompt in each row.

Whether a row is held out is decided by a hash of its prompt, so a prompt that occurs twice is never in both splits; or
the held-out rows come from a file or split of their own, and then rows to train on with one of their prompts are left
out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat

from configs.schema import PathStr, Section
from rollout_workers.tasks.protocol import (
    Demonstration,
    Failure,
    LazySequence,
    Prompt,
    Score,
    Split,
    after_prompt,
    require_split,
    split_of,
)
from rollout_workers.tasks.row_files import Row, read_dataset, read_file, read_options, row_files, single_split, suffix
from rollout_workers.tasks.row_limits import MAX_GIB, bounded_rows
from rollout_workers.tasks.row_values import (
    ASSISTANT,
    Item,
    answers_of,
    asked,
    require_one_copy,
    required,
    spellings,
    unusable,
)
from rollout_workers.tasks.sampled_ids import SampledIds, sampled_ids
from rollout_workers.tasks.scorer_options import NO_ANSWER, Judge, Limits, Preference, Python, Verifier
from rollout_workers.tasks.scorers import Scorer, build_scorer
from rollout_workers.tasks.verifiers import answer_problem

BETWEEN = "\n\n"
"""Stands between the turns of a conversation that is shown, or given to a base LM without chat template."""
FIRST = 100
"""Rows by which a column of class labels is known: some have no label."""
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]


class Judging(Section):
    """Options of every task of rows: how a prompt is asked, and how an answer is judged."""

    template: str = "{prompt}"
    """What the model is given, ``{prompt}`` standing for the row's prompt."""
    verifier: Verifier = "exact"
    """``exact`` (but for blanks and case), ``number`` (the last one), ``contains`` (as whole words), ``regex`` (the
    answer is one), ``math`` (math-verify), ``python`` (a function of your own), ``preference`` (a reward model) or
    ``judge`` (a language model)."""
    limits: Limits = Limits()
    python: Python | None = None
    preference: Preference | None = None
    judge: Judge | None = None

    def scorer(self) -> Scorer:
        """What judges; ``ValueError`` for sections that do not fit the verifier."""
        if "{prompt}" not in self.template:
            raise ValueError(
                f"task.options.template is {self.template!r:.80} without {{prompt}}; write it where the prompt goes"
            )
        return build_scorer(self.verifier, self.limits, self.python, self.preference, self.judge)


class RowsOptions(Judging):
    """``task.options`` of ``rows``, ``jsonl`` and ``parquet``."""

    path: PathStr
    """A file, or a folder of files (``read_file`` names the kinds); in a config, relative to it."""
    heldout_path: PathStr | None = None
    """The same for the held-out rows; ``null``: a share of the prompts in ``path``."""
    prompt: str = "prompt"
    """Key of the prompt, a text or a list of messages; ``question.text`` and ``inputs.0`` lead into mappings and
    lists."""
    answer: str = "answer"
    """Key of the answer: a text, a number, a truth value, a date, a list of answers that are all right, or a list of
    messages that ends with the assistant's; verifiers ``python``, ``preference`` and ``judge`` do without."""
    response: str | None = None
    """Key of the text to train on; ``null``: the answer, the first of several."""
    heldout_share: OpenShare = 0.2
    """Share of the prompts that is held out."""
    class_names: bool = False
    """Class labels of Hugging Face's ``datasets`` by their names instead of their numbers."""
    max_gib: PositiveFloat = MAX_GIB
    """Memory that the rows may take in each process, GiB, held-out ones and examples apart; more is refused."""
    shots_path: PathStr | None = None
    """A file with the examples of ``task.shots``; ``null``: the first rows to train on."""

    def sources(self) -> tuple[Iterable[tuple[str, Row]], Iterable[tuple[str, Row]] | None]:
        """Rows with their places, and the held-out ones where they are apart."""
        read = partial(read_file, class_names=self.class_names)
        if self.heldout_path is None:
            single_split(Path(self.path))
        return read(Path(self.path)), None if self.heldout_path is None else read(Path(self.heldout_path))

    def unnamed_classes(self) -> list[str]:
        """Columns that hold the numbers of classes whose names are known."""
        files = [] if isinstance(self, DatasetOptions) else row_files(Path(self.path))[:1]
        if self.class_names or any(suffix(file) != ".parquet" for file in files):
            return []
        both = (self.model_copy(update={"class_names": named}).sources()[0] for named in (False, True))
        rows = [(plain, named) for (_, plain), (_, named) in islice(zip(*both, strict=True), FIRST)]
        found = {
            key for plain, named in rows for key in plain if isinstance(named[key], str) > isinstance(plain[key], str)
        }
        return sorted(found)


class DatasetOptions(RowsOptions):
    """``task.options`` of ``dataset``; ``path`` is a ``save_to_disk`` folder, or whatever ``datasets.load_dataset``
    takes."""

    subset: str | None = None
    """The data set's configuration."""
    split: str = "train"
    heldout_split: str | None = None
    """``null``: a share of the prompts in ``split``."""

    def sources(self) -> tuple[Iterable[tuple[str, Row]], Iterable[tuple[str, Row]] | None]:
        """Rows of the two splits."""
        if self.heldout_path is not None:
            raise ValueError("task.options.heldout_path is for files; of a data set set task.options.heldout_split")
        read = partial(read_dataset, self.path, self.subset, class_names=self.class_names)
        return read(self.split), None if self.heldout_split is None else read(self.heldout_split)


class Rows:
    """The task; see the module's docstring."""

    def __init__(
        self,
        name: str,
        train: Sequence[Item],
        heldout: Sequence[Item],
        judging: Judging,
        shots: Sequence[Item] = (),
    ) -> None:
        self.name = name
        self.scorer = judging.scorer()
        self.parts = (*self.scorer.parts, "answered")
        self._judging = judging
        self._shots = [(self._asked(item), _response(item, f"the example {item.prompt!r:.60}")) for item in shots]
        shown = {item.prompt for item in shots}
        known = {item.prompt for item in heldout} | shown
        self._items: dict[Split, list[Item]] = {
            # Responses that were sampled to a single prompt are both.
            "train": [item for item in train if item.prompt not in known] or [item for item in train if item.ids],
            "heldout": [item for item in heldout if item.prompt not in shown],
        }
        for split, items in self._items.items():
            if not items:
                raise ValueError(
                    f"{name}: no row falls to the {split} split; add rows with other prompts, or change "
                    "task.options.heldout_share"
                )

    @property
    def verifier(self) -> Verifier:
        """What judges."""
        return self._judging.verifier

    def unnamed_classes(self) -> list[str]:
        """Columns of class labels that are read as numbers."""
        return self._judging.unnamed_classes() if isinstance(self._judging, RowsOptions) else []

    def items(self) -> Iterator[Item]:
        """Those of both splits."""
        return chain(*self._items.values())

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The rows of the split, in their order; the metadata of each is the user's row."""
        require_split(split)
        return LazySequence(len(self._items[split]), lambda index: self._prompt(split, index))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """The texts of ``task.options.response``, else the answers; ``ValueError`` when indexed where there is
        neither."""
        prompts, items = self.prompts(split), self._items[split]
        return LazySequence(
            len(prompts),
            lambda i: Demonstration(prompt=prompts[i], response=_response(items[i], prompts[i].id), ids=items[i].ids),
        )

    def sampled(self) -> list[SampledIds]:
        """The token ids of the rows that ``latent-control sample`` wrote."""
        return [item.ids for items in self._items.values() for item in items if item.ids is not None]

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """The scorer's verdict; the part ``answered`` is 1 for any text that is not blank."""
        return self.score_batch([prompt], [text])[0]

    def score_batch(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score | Failure]:
        """As ``score``, for many at once."""
        verdicts = self._verdicts(prompts, texts)
        return [
            verdict
            if isinstance(verdict, Failure)
            else replace(verdict, parts={**verdict.parts, "answered": float(bool(text.strip()))})
            for verdict, text in zip(verdicts, texts, strict=True)
        ]

    def _verdicts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score | Failure]:
        """A reward function gets the user's row; other scorers the prompt and, one after the other, each right
        answer."""
        if self._judging.verifier == "python":
            return self.scorer.score([dict(prompt.metadata) for prompt in prompts], texts)
        items = [self._item(prompt) for prompt in prompts]
        asked = [(i, answer) for i, item in enumerate(items) for answer in item.answers or ("",)]
        found = self.scorer.score(
            [{"prompt": items[i].prompt, "answer": answer} for i, answer in asked], [texts[i] for i, _ in asked]
        )
        best: dict[int, Score | Failure] = {}
        for (i, _), verdict in zip(asked, found, strict=True):
            if i not in best or (isinstance(verdict, Score) and verdict.success):
                best[i] = verdict
        return [best[i] for i in range(len(items))]

    def _item(self, prompt: Prompt) -> Item:
        split, index = prompt.id.split("/")[-2:]
        return self._items["heldout" if split == "heldout" else "train"][int(index)]

    def _asked(self, item: Item) -> str:
        """What the model is asked: the prompt, or the last message of the conversation, in the template."""
        text = item.turns[-1][1] if item.turns else item.prompt
        return self._judging.template.replace("{prompt}", text)

    def _prompt(self, split: Split, index: int) -> Prompt:
        """A row after the examples: in one text, or as messages before its own (a system message stays the first)."""
        item = self._items[split][index]
        asked, turns = self._asked(item), item.turns
        if turns:
            first = 1 if turns[0][0] == "system" else 0
            shown = [turn for q, a in self._shots for turn in (("user", q), (ASSISTANT, a))]
            turns = (*turns[:first], *shown, *turns[first:-1], (turns[-1][0], asked))
            text = BETWEEN.join(content for _, content in turns)
        else:
            examples = (f"{question}{after_prompt(question)}{answer}" for question, answer in self._shots)
            text = BETWEEN.join([*examples, asked])
        return Prompt(id=f"{self.name}/{split}/{index}", text=text, turns=turns, metadata=item.row)


def _response(item: Item, name: str) -> str:
    if item.response is None and not item.answers:
        raise ValueError(f"{name} has neither answer nor response: set task.options.response, or train on other data")
    return item.response if item.response is not None else item.answers[0]


def build_rows(name: str, options: Mapping[str, object], *, shots: int = 0) -> Rows:
    """Rows of files or of a ``dataset``; ``ValueError`` names what is wrong, and where."""
    kind = DatasetOptions if name == "dataset" else RowsOptions
    if "path" not in options:
        raise ValueError(
            f"task.options.path of {name} is missing; e.g. task.options: "
            f"{{path: data.{name if name in ('parquet', 'dataset') else 'jsonl'}}}"
        )
    settings = read_options(kind, options, name)
    every, apart = settings.sources()
    items = _items(every, settings)
    require_one_copy(items, Path(settings.path))
    if apart is None:
        train, heldout = split_items(items, settings.heldout_share)
    else:
        train, heldout = items, _items(apart, settings)
    return Rows(name, train, heldout, settings, _examples(train, heldout, settings, shots))


def _examples(train: Sequence[Item], heldout: Sequence[Item], options: RowsOptions, count: int) -> list[Item]:
    """``task.shots`` rows with different prompts; ``ValueError`` where there are fewer."""
    if not count and options.shots_path is not None:
        raise ValueError(f"task.options.shots_path is {options.shots_path!r}, but task.shots is 0; set task.shots")
    held = {item.prompt for item in heldout}
    if options.shots_path is not None:
        rows = _items(read_file(Path(options.shots_path)), options)
    else:
        rows = [item for item in train if item.prompt not in held]
    found: dict[str, Item] = {}
    for item in rows:
        found.setdefault(item.prompt, item)
    if len(found) < count:
        raise ValueError(
            f"task.shots is {count}, but {options.shots_path or 'the rows to train on'} have {len(found)} prompts; "
            "set fewer, or name a file of examples by task.options.shots_path"
        )
    return list(found.values())[:count]


def split_items(items: Sequence[Item], heldout_share: float) -> tuple[list[Item], list[Item]]:
    """(train, held-out) by a hash of the prompt. Of two prompts or more one at least falls to each side, however small
    the share."""
    ranked = sorted({item.prompt for item in items}, key=lambda text: hashlib.sha256(text.encode()).digest())
    held = {prompt for prompt in ranked if split_of(prompt, heldout_share) == "heldout"} or set(ranked[:1])
    if len(held) == len(ranked) > 1:
        held.remove(ranked[-1])
    train = [item for item in items if item.prompt not in held or (len(ranked) == 1 and item.ids)]
    return train, [item for item in items if item.prompt in held]


def _items(rows: Iterable[tuple[str, Row]], options: RowsOptions) -> list[Item]:
    return [_item(row, place, options) for place, row in bounded_rows(rows, options.max_gib)]


def _item(row: Row, place: str, options: RowsOptions) -> Item:
    """What the options read off a row; ``ValueError`` names place, key, value and remedy.

    The names of the options lead to their values too, where the user has no column of that name.
    """
    prompt = required(row, options.prompt, place, "prompt")
    turns = asked(prompt)
    text = BETWEEN.join(content for _, content in turns) or "".join(spellings(prompt)[:1])
    if not text.strip():
        raise unusable(place, "prompt", options.prompt, prompt)
    found = {"prompt": prompt}
    answers: tuple[str, ...] = ()
    needless = options.verifier in NO_ANSWER
    if not needless or "answer" in options.model_fields_set or options.answer in row:
        answer = found["answer"] = required(row, options.answer, place, "answer")
        answers = answers_of(answer)
        if not answers and not needless:
            raise unusable(place, "answer", options.answer, answer)
        for one in () if needless else answers:
            if problem := answer_problem(options.verifier, one):
                raise ValueError(f"{place}: {options.answer!r} {problem}")
    response, ids = None, sampled_ids(row, place)
    if options.response is not None:
        found["response"] = required(row, options.response, place, "response")
        response = "".join(answers_of(found["response"])[:1])
        if not response:
            raise unusable(place, "response", options.response, found["response"])
        ids = None  # those of the answer
    return Item(
        prompt=text, answers=answers, response=response, row={**found, **row}, turns=turns, ids=ids, place=place
    )
