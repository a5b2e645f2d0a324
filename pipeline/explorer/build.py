"""From a run folder to the explorer's dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.loading import load_config
from configs.schema import Explorer, RunConfig
from latent_control.model import LatentActionLM
from latent_control.persistence import CONFIG, base_path, load_policy, read_shape
from latent_control.text import load_tokenizer
from pipeline.cost import PATHS
from pipeline.explorer import counts, gain
from pipeline.explorer.corpus import Corpus, read_corpus
from pipeline.explorer.path import Walked, walk
from pipeline.explorer.reading import Clock, Effects, Models, Read, effects, read
from pipeline.explorer.records import Code, Context, Dataset, Estimate, NGram, Shift, Shown, Split, Summary, Training, Why
from pipeline.explorer.why import Explainer, prompt_of, to_explain
from pipeline.slices import flat, labels
from rollout_workers.tasks import build_task

RUN_CONFIG, EVALUATION, POSITION = "config.yaml", "evaluation.json", "position"
TOKENS_SHOWN, PROMPT_CHARACTERS = 200_000, 4000
READ_SHARE, EFFECTS_SHARE, WALK_SHARE = 0.25, 0.3, 0.65
"""Of the time budget, after which reading choices, measuring effects and sampling for the gain end; explaining gets the rest."""
FIELDS, TENTH = 4, 10
"""Most fields of the prompts' metadata that choices are split by; the first and last so many parts of training are compared."""


class Vocabulary:
    """Token ids to numbers in the order in which they are asked for, and their texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._numbers = tokenizer, dict[int, int]()

    def __call__(self, token: int) -> int:
        return self._numbers.setdefault(int(token), len(self._numbers))

    def texts(self) -> tuple[str, ...]:
        """The text of each number; special tokens by name."""
        return tuple(self._tokenizer.decode([token], skip_special_tokens=False) for token in self._numbers)


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """A run's rollouts and what the model says to those of the page."""

    corpus: Corpus
    """All that was read."""
    shown: Corpus
    """Those of the page."""
    rows: np.ndarray
    """Where these are in ``corpus``."""
    found: Read | None
    sums: Effects | None
    walked: Walked | None
    why: list[Why]


def explore(run_dir: Path, settings: Explorer | None = None) -> tuple[Dataset, Corpus, tuple[str, ...]]:
    """The dataset of a finished run, its rollouts, and the texts of their tokens (as ``overlap`` wants them).

    Raises:
        ValueError: the run has no rollouts of latent actions.
    """
    config = load_config(run_dir / RUN_CONFIG, [], check_paths=False)
    settings = settings or config.explorer
    before, after = policies_of(run_dir)
    shape = read_shape(after)
    corpus, stored = read_corpus(run_dir, num_actions=shape.num_actions, span=shape.span)
    tokenizer = load_tokenizer(base_path(after), trust_remote_code=config.base.trust_remote_code)
    words = Vocabulary(tokenizer)
    rows = corpus.whole_groups(settings.rollouts, TOKENS_SHOWN)
    shown = corpus.subset(rows)
    for token in np.argsort(-np.bincount(shown.tokens), kind="stable")[: len(np.unique(shown.tokens))]:
        words(token)  # frequent ones get short numbers
    found = Gathered(corpus=corpus, shown=shown, rows=rows, found=None, sums=None, walked=None, why=[])
    notes = []
    if settings.seconds > 0:
        found = with_model(found, load_models(before, after, config, tokenizer), config, settings, words)
        notes = _bounds(found, settings)
    else:
        notes.append("explorer.seconds is 0: nothing was computed from the model; latent-control explain RUN --seconds 60 does that")
    if stored > len(corpus):
        notes.append(f"counts are over {len(corpus)} of {stored} stored rollouts, spread over training")
    return _dataset(run_dir, config, found, words, stored, notes), corpus, _token_texts(corpus, tokenizer)


def policies_of(run_dir: Path) -> tuple[Path, Path]:
    """The checkpoints before and after RL.

    Raises:
        ValueError: there is no improved latent policy.
    """
    after = run_dir / "checkpoints" / "improve"
    if not (after / CONFIG).is_file():
        raise ValueError(f"{run_dir} has no improved latent policy: the explorer is about runs whose improve stage is done at level latent")
    records = [run_dir / "stages" / f"{stage}.json" for stage in PATHS["improved"][:-1]]
    there = [path for path in records if path.is_file()]
    if not there:
        raise ValueError(f"{run_dir / 'stages'} has no record of what the improve stage started from")
    return (run_dir / json.loads(there[-1].read_text(encoding="utf-8"))["checkpoint"]).resolve(), after


def load_models(before: Path, after: Path, config: RunConfig, tokenizer: Any) -> Models:
    """Both policies on one base LM."""
    trusted = config.base.trust_remote_code
    device = torch.device("cuda" if config.rollout.gpus_per_worker and torch.cuda.is_available() else "cpu")
    model = LatentActionLM.from_pretrained(after, dtype=config.base.dtype, trust_remote_code=trusted).to(device)
    # As rollout workers and exports host it: in half precision another rounding writes other tokens.
    model.inverse_dynamics = None
    model.cast_modules().policy.float()
    first = load_policy(before, trust_remote_code=trusted).eval().float().to(device)
    return Models(model=model, before=first, tokenizer=tokenizer, temperature=config.rollout.temperature, top_k=config.rollout.top_k)


def with_model(some: Gathered, models: Models, config: RunConfig, settings: Explorer, words: Vocabulary) -> Gathered:
    """What needs the model, inside the time budget."""
    clock, shown = Clock(settings.seconds), some.shown
    found = read(shown, models, clock, READ_SHARE)
    sums = effects(found, shown.actions[found.choices], models, clock, EFFECTS_SHARE)
    task = build_task(config.task)
    walked = walk(models, config, task, clock, WALK_SHARE)
    explainer = Explainer(shown, models, config, task, words)
    why = explainer.all(to_explain(shown, found.rows, settings.explained), clock) if settings.explained else []
    return replace(some, found=found, sums=sums, walked=walked, why=why)


def _bounds(some: Gathered, settings: Explorer) -> list[str]:
    """What the time budget cut off."""
    assert some.found is not None and some.sums is not None
    wanted = min(settings.explained, len(some.found.rows))
    parts = (
        ("policies were read at the choices of", len(some.found.rows), len(some.shown), "rollouts"),
        ("codes were compared at", some.sums.states, len(some.found.states), "states"),
        ("explained are", len(some.why), wanted, "rollouts"),
    )
    limit = f"explorer.seconds of {settings.seconds:g} allowed no more"
    return [f"{what} {done} of {planned} {unit}: {limit}" for what, done, planned, unit in parts if done < planned]


# -- the parts of the dataset -------------------------------------------------------------------------------------------


def _dataset(run_dir: Path, config: RunConfig, some: Gathered, words: Vocabulary, stored: int, notes: Sequence[str]) -> Dataset:
    codes, total = _codes(some, words)
    prompts = list(dict.fromkeys(some.shown.prompt_texts))
    training = _training(some.corpus)
    corpus = some.corpus
    early, late = (np.isin(corpus.versions, v) for v in (_ends(corpus.versions, 1), _ends(corpus.versions, -1)))
    usage = np.bincount(corpus.actions[corpus.choices], minlength=corpus.num_actions) / len(corpus.choices)
    summary = Summary(
        run=run_dir.name,
        num_actions=corpus.num_actions,
        span=corpus.span,
        rollouts=len(corpus),
        stored=stored,
        choices=len(corpus.choices),
        perplexity=float(np.exp(counts.entropy(usage))),
        reward_first=float(corpus.rewards[early].mean()),
        reward_last=float(corpus.rewards[late].mean()),
        success_first=float(corpus.success[early].mean()),
        success_last=float(corpus.success[late].mean()),
        world=corpus.world,
        gain=total,
        path=() if some.walked is None else tuple(some.walked.rewards.tolist()),
        path_rollouts=0 if some.walked is None else int(some.walked.sizes.sum()),
        evaluation=_evaluation(run_dir),
        notes=tuple(notes),
    )
    splits = tuple(_split(some, name, keys, names) for name, keys, names in _keys(some, config, words))
    rollouts = _shown(some, words, prompts)
    return Dataset(
        summary=summary,
        vocabulary=words.texts(),  # last: the parts above have asked for their tokens
        prompts=tuple(text[-PROMPT_CHARACTERS:] for text in prompts),
        codes=codes,
        training=training,
        splits=splits,
        rollouts=rollouts,
        why=tuple(some.why),
    )


def _codes(some: Gathered, words: Vocabulary) -> tuple[tuple[Code, ...], Estimate | None]:
    corpus, n, found, sums = some.corpus, some.corpus.num_actions, some.found, some.sums
    at = corpus.choices
    taken = corpus.actions[at]
    uses = np.bincount(taken, minlength=n)
    entropies = counts.token_entropies(taken, corpus.tokens[at], n)
    advantage = np.bincount(taken, corpus.advantages[corpus.rows[at]], minlength=n) / np.maximum(uses, 1)
    where, (better, worse) = counts.contexts(corpus), counts.ngrams(corpus)
    place = {int(r): i for i, r in enumerate(some.rows)}
    gains: list[Estimate] | None = None
    total: Estimate | None = None
    if (walked := some.walked) is not None:
        gains = gain.by_code(walked.codes, walked.parts, walked.prompts, walked.sizes, n)
        total = gain.estimate(walked.parts, walked.prompts, walked.sizes)

    def code(k: int, healthy: str) -> Code:
        return Code(
            usage=float(uses[k] / len(at)),
            uses=int(uses[k]),
            token_entropy=float(entropies[k]),
            health=healthy,
            advantage=float(advantage[k]) if uses[k] else None,
            before=None if found is None else float(found.before[:, k].mean()),
            after=None if found is None else float(found.after[:, k].mean()),
            gain=None if gains is None else gains[k],
            strength=None if sums is None else sums.strength(k),
            shifts=() if sums is None else tuple(_shift(words, *row) for row in sums.top(k)),
            anywhere=() if sums is None else tuple((words(t), p) for t, p in sums.likeliest(k)),
            contexts=tuple(_context(words, place, *row) for row in where.get(k, [])),
            better=tuple(_gram(words, *gram) for gram in better.get(k, [])),
            worse=tuple(_gram(words, *gram) for gram in worse.get(k, [])),
        )

    return tuple(code(k, healthy) for k, healthy in enumerate(counts.health(uses / len(at)))), total


def _shift(words: Vocabulary, token: int, probability: float, mixture: float, log_shift: float) -> Shift:
    return Shift(token=words(token), probability=probability, mixture=mixture, log_shift=log_shift)


def _context(words: Vocabulary, place: dict[int, int], before: Sequence[int], token: int, count: int, share: float, row: int) -> Context:
    return Context(before=tuple(map(words, before)), token=words(token), count=count, share=share, rollout=place.get(row))


def _gram(words: Vocabulary, codes: tuple[int, ...], tokens: Sequence[int], high: int, low: int, z: float) -> NGram:
    return NGram(codes=codes, tokens=tuple(map(words, tokens)), high=high, low=low, z=z)


def _training(corpus: Corpus) -> Training:
    place, names = counts.points(corpus.versions)
    at = corpus.choices
    usage = counts.shares(place[corpus.rows[at]], corpus.actions[at], len(names), corpus.num_actions)
    sizes = np.bincount(place)
    return Training(
        updates=tuple(names),
        usage=_rows(usage),
        perplexity=tuple(np.exp(counts.entropy(usage)).tolist()),
        reward=tuple((np.bincount(place, corpus.rewards) / sizes).tolist()),
        success=tuple((np.bincount(place, corpus.success) / sizes).tolist()),
    )


def _ends(versions: np.ndarray, side: int) -> np.ndarray:
    """The first (1) or last (-1) tenth of the policy versions, one at least."""
    there = np.unique(versions)
    return there[::side][: max(1, len(there) // TENTH)]


def _keys(some: Gathered, config: RunConfig, words: Vocabulary) -> list[tuple[str, np.ndarray, list[str]]]:
    """(name, the key of each choice of the page's rollouts [C], names of the keys): position, token before, task, metadata."""
    shown, at = some.shown, some.shown.choices
    position, names = counts.places(shown.positions[at])
    found = [(POSITION, position, names)]
    task = build_task(config.task)
    prompts = {pid: prompt_of(task, pid, text) for pid, text in dict(zip(shown.prompt_ids, shown.prompt_texts, strict=True)).items()}
    by_prompt = [("task", {pid: pid.rsplit("/", 2)[0] for pid in prompts})]
    metadata = {pid: prompt.metadata for pid, prompt in prompts.items() if prompt is not None}
    for name in sorted({name for one in metadata.values() for name, _ in flat(one)}):
        some_labels = labels(name, list(metadata.values()))
        if 1 < len(set(some_labels)) <= len(metadata) // 2:
            by_prompt.append((name, dict(zip(metadata, some_labels, strict=True))))
    for name, label in by_prompt[: 1 + FIELDS]:
        known = sorted(set(label.values()), key=_by_number)
        number = {text: i for i, text in enumerate([*known, "unknown"])}
        keys = np.array([number[label.get(pid, "unknown")] for pid in shown.prompt_ids])[shown.rows[at]]
        found.append((name, keys, list(number)[: int(keys.max()) + 1]))
    return found


def _by_number(label: str) -> tuple[float, str]:
    first = label.split(" ", 1)[0]
    return (float(first) if first.lstrip("-").replace(".", "", 1).isdecimal() else float("inf"), label)


def _split(some: Gathered, name: str, keys: np.ndarray, names: list[str]) -> Split:
    shown, found, n = some.shown, some.found, some.shown.num_actions
    codes = shown.actions[shown.choices]
    table = counts.shares(keys, codes, len(names), n)
    sizes = np.bincount(keys, minlength=len(names))
    split = Split(name=name, keys=tuple(names), counts=tuple(sizes.tolist()), usage=_rows(table))
    if found is None:
        return split
    at = np.searchsorted(shown.choices, found.choices)
    own = keys[at]
    hot = np.eye(len(names))[own]  # [c, K]
    each = np.maximum(hot.sum(0), 1)[:, None]
    return replace(
        split, before=_rows(hot.T @ found.before / each), after=_rows(hot.T @ found.after / each), gain=_gains(some, name, names)
    )


def _gains(some: Gathered, name: str, names: list[str]) -> tuple[tuple[float, ...], ...]:
    """The gain by position [K, N]; what lies behind the page's own rollouts counts for their last position."""
    walked = some.walked
    if walked is None or name != POSITION:
        return ()
    width = counts.width_of(some.shown.positions[some.shown.choices])
    keys = np.minimum(walked.positions // width, len(names) - 1)
    return _rows(gain.by_key(keys, walked.codes, walked.parts, (len(names), some.shown.num_actions), int(walked.sizes.sum())))


def _shown(some: Gathered, words: Vocabulary, prompts: list[str]) -> tuple[Shown, ...]:
    shown, found = some.shown, some.found
    chances = np.full(len(shown.tokens), -1)
    chances[shown.choices] = np.round(100 * np.exp(shown.logp[shown.choices]))
    policies = [np.full(len(shown.tokens), -1) for _ in range(2)]
    if found is not None:
        codes = shown.actions[found.choices]
        for values, p in zip(policies, (found.before, found.after), strict=True):
            values[found.choices] = np.round(100 * p[np.arange(len(codes)), codes])
    known = set() if found is None else set(found.rows.tolist())
    number = {text: i for i, text in enumerate(prompts)}

    def one(r: int) -> Shown:
        cells = slice(int(shown.offsets[r]), int(shown.offsets[r + 1]))
        before, after = (tuple(values[cells].tolist()) if r in known else () for values in policies)
        return Shown(
            id=shown.ids[r],
            prompt=number[shown.prompt_texts[r]],
            update=int(shown.versions[r]) + 1,
            reward=float(shown.rewards[r]),
            advantage=float(shown.advantages[r]),
            success=bool(shown.success[r]),
            tokens=tuple(words(t) for t in shown.tokens[cells].tolist()),
            codes=tuple(shown.actions[cells].tolist()),
            chances=tuple(chances[cells].tolist()),
            before=before,
            after=after,
        )

    return tuple(one(r) for r in range(len(shown)))


def _rows(table: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def _evaluation(run_dir: Path) -> tuple[tuple[str, float], ...]:
    path = run_dir / EVALUATION
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return tuple((name, row["sampled"]) for name, row in result.items() if isinstance(row, dict) and "sampled" in row)


def _token_texts(corpus: Corpus, tokenizer: Any) -> tuple[str, ...]:
    """The text of each choice's token [C]."""
    there, local = np.unique(corpus.tokens[corpus.choices], return_inverse=True)
    texts = [tokenizer.decode([int(token)], skip_special_tokens=False) for token in there]
    return tuple(texts[i] for i in local)


def beside(first: tuple[Dataset, Corpus, tuple[str, ...]], second: tuple[Dataset, Corpus, tuple[str, ...]]) -> tuple[Dataset, Dataset]:
    """Two explored runs, each code with the most similar one of the other: by the texts they produced, as runs may differ in tokenizer."""
    (a, corpus_a, texts_a), (b, corpus_b, texts_b) = first, second
    number = {text: i for i, text in enumerate(dict.fromkeys((*texts_a, *texts_b)))}
    codes = [corpus.actions[corpus.choices] for corpus in (corpus_a, corpus_b)]
    tokens = [np.array([number[text] for text in texts]) for texts in (texts_a, texts_b)]
    table = counts.overlap(codes[0], tokens[0], codes[1], tokens[1], (corpus_a.num_actions, corpus_b.num_actions))
    return tuple(replace(own, similar=_nearest(part)) for own, part in ((a, table), (b, table.T)))  # type: ignore[return-value]


def _nearest(table: np.ndarray) -> tuple[tuple[int, float], ...]:
    return tuple((int(row.argmax()), float(row.max())) for row in table)
