"""Several tasks as one, ``mixture``: prompts of all of them in turn, in proportion to weights, each judged by its own
verifier.

Prompt i belongs to a task by its place in a cycle, so a mixture is as deterministic as its parts. In training the cycle
goes on until every task was gone through, the shorter ones several times; the held-out split ends with the first task
that ends, so nothing in it occurs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import gcd, lcm

from pydantic import PositiveFloat

from configs.schema import Section, TaskConfig
from rollout_workers.tasks.protocol import (
    Demonstration,
    Failure,
    LazySequence,
    Prompt,
    Score,
    Split,
    Task,
    require_split,
    score_all,
)
from rollout_workers.tasks.row_files import read_options

MEMBER = "mixture_task"
"""Key of the metadata that names a prompt's own task; ``evaluation.slices: [mixture_task]`` reports success by it."""
_FINEST = 20


class Member(TaskConfig):
    """One task of a mixture: as ``task``, with a weight; chat and the longest prompt are the mixture's."""

    weight: PositiveFloat = 1.0


class MixtureOptions(Section):
    """``task.options`` of ``mixture``."""

    tasks: tuple[Member, ...]


class Mixture:
    """The task; see the module's docstring."""

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float]) -> None:
        names = [task.name for task in tasks]
        self._labels = [n if names.count(n) == 1 else f"{n}#{names[:k].count(n) + 1}" for k, n in enumerate(names)]
        self._tasks = dict(zip(self._labels, tasks, strict=True))
        self._cycle = cycle(weights)
        self.parts = tuple(dict.fromkeys(part for task in tasks for part in task.parts))

    @property
    def tasks(self) -> Collection[Task]:
        """Its members."""
        return self._tasks.values()

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts of all tasks, mixed; one knows its task by ``mixture_task`` in its metadata."""
        require_split(split)
        every = [task.prompts(split) for task in self._tasks.values()]
        return LazySequence(self._length(split, every), lambda i: self._labelled(every, split, i))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Those of the tasks, in the order of the prompts."""
        prompts, every = self.prompts(split), [task.demonstrations(split) for task in self._tasks.values()]

        def demonstration(index: int) -> Demonstration:
            k, place = self._place(index)
            return replace(every[k][place % len(every[k])], prompt=prompts[index])

        return LazySequence(len(prompts), demonstration)

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """The verdict of the prompt's own task; parts that it does not have are 0."""
        return self.score_batch([prompt], [text])[0]

    def score_batch(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score | Failure]:
        """As ``score``; each task gets its share at once."""
        found: dict[int, Score | Failure] = {}
        for label, task in self._tasks.items():
            places = [i for i, prompt in enumerate(prompts) if prompt.metadata[MEMBER] == label]
            own = [self._own(prompts[i].id) for i in places]
            found |= zip(places, score_all(task, own, [texts[i] for i in places]), strict=True)
        nothing = dict.fromkeys(self.parts, 0.0)
        verdicts = (found[i] for i in range(len(prompts)))
        return [v if isinstance(v, Failure) else replace(v, parts={**nothing, **v.parts}) for v in verdicts]

    def _labelled(self, every: Sequence[Sequence[Prompt]], split: Split, index: int) -> Prompt:
        k, place = self._place(index)
        prompt = every[k][place % len(every[k])]
        return replace(prompt, id=f"{self.name}/{split}/{index}", metadata={**prompt.metadata, MEMBER: self._labels[k]})

    def _own(self, name: str) -> Prompt:
        """The member's own prompt behind the mixture's prompt of that id."""
        split: Split = "heldout" if name.split("/")[-2] == "heldout" else "train"
        k, place = self._place(int(name.rpartition("/")[2]))
        prompts = list(self._tasks.values())[k].prompts(split)
        return prompts[place % len(prompts)]

    def _place(self, index: int) -> tuple[int, int]:
        """Which task prompt ``index`` comes from, and its place in that task."""
        rounds, rest = divmod(index, len(self._cycle))
        k = self._cycle[rest]
        return k, rounds * self._cycle.count(k) + self._cycle[:rest].count(k)

    def _length(self, split: Split, every: Sequence[Sequence[Prompt]]) -> int:
        ends = []
        for k, prompts in enumerate(every):
            places = [i for i, member in enumerate(self._cycle) if member == k]
            rounds, rest = divmod(len(prompts), len(places))
            ends.append(rounds * len(self._cycle) + places[rest])  # where the first prompt too many would stand
        return max(ends) if split == "train" else min(ends)


def cycle(weights: Sequence[float]) -> list[int]:
    """Members in proportion to their weights (each a twentieth of the largest at least), spread evenly: [2, 1] -> [0,
    1, 0]."""
    shares = [max(Fraction(1, _FINEST), Fraction(w / max(weights)).limit_denominator(_FINEST)) for w in weights]
    scale = lcm(*(share.denominator for share in shares))
    counts = [int(share * scale) for share in shares]
    counts = [count // gcd(*counts) for count in counts]
    owed, order = [0] * len(counts), []
    for _ in range(sum(counts)):  # smooth weighted round robin
        owed = [debt + count for debt, count in zip(owed, counts, strict=True)]
        chosen = owed.index(max(owed))
        owed[chosen] -= sum(counts)
        order.append(chosen)
    return order


def build_mixture(options: Mapping[str, object], build: Callable[[TaskConfig], Task]) -> Mixture:
    """The mixture of ``options``; ``build`` makes its tasks. ``ValueError`` names the member that is wrong."""
    members = options.get("tasks")
    if isinstance(members, list | tuple):  # a bare name will do
        options = {**options, "tasks": [{"name": m} if isinstance(m, str) else m for m in members]}
    settings = read_options(MixtureOptions, options, "mixture")
    if not settings.tasks:
        raise ValueError(
            "task.options.tasks of mixture is empty; name a task, e.g. tasks: [countdown, reasoning_gym/gcd]"
        )
    tasks = [_member(f"task.options.tasks[{number}]", one, build) for number, one in enumerate(settings.tasks)]
    return Mixture(tasks, [member.weight for member in settings.tasks])


def _member(place: str, member: TaskConfig, build: Callable[[TaskConfig], Task]) -> Task:
    if member.name == "mixture":
        raise ValueError(f"{place} is a mixture itself; name its tasks here")
    if shared := sorted(member.model_fields_set & {"chat", "max_prompt_tokens"}):
        raise ValueError(f"{place}.{shared[0]}: all of a mixture share it; set task.{shared[0]}")
    try:
        return build(member)
    except ValueError as error:
        raise ValueError(f"{place} ({member.name}): {error}") from error
