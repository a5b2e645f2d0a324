"""From a run folder to the explorer's dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.loading import load_config
from configs.schema import Explorer, RunConfig
from latent_control.pretrained import base_path, read_shape
from latent_control.text import load_tokenizer
from pipeline.pages.explorer import counts, gain, records
from pipeline.pages.explorer.collapse import ALIKE, clusters, collapse
from pipeline.pages.explorer.collected import Collected, Vocabulary
from pipeline.pages.explorer.corpus import Corpus, read_corpus
from pipeline.pages.explorer.path import walk
from pipeline.pages.explorer.policies import load_models, policies_of
from pipeline.pages.explorer.reading import Clock, Models, effects, read
from pipeline.pages.explorer.splits import splits
from pipeline.pages.explorer.why import Explainer, to_explain
from pipeline.runs.layout import CONFIG as RUN_CONFIG
from pipeline.runs.layout import EVALUATION, METRICS, stage_record
from pipeline.runs.manifest import read_json
from pipeline.runs.metrics_log import ends, series
from pipeline.runs.stage_table import IMPROVE, MAKERS, behind
from rollout_workers.tasks import EpisodeTask, Task, build_task

TOKENS_SHOWN, PROMPT_CHARACTERS, PROMPTS_CHARACTERS = 150_000, 4000, 600_000
"""Of the rollouts, of the end of each prompt, and of all prompts: the page stays below 5 MB."""
READ_SHARE, EFFECTS_SHARE, WALK_SHARE = 0.35, 0.45, 1.0
"""Of the time budget, after which reading choices, measuring effects and sampling for the gain end; how many rollouts
are explained is a number of the config, and no matter of time."""
PLAYED_ANEW = (
    "these are episodes of several turns: which codes carry the gain, and how another choice would have ended, would "
    "need the environments stepped again and are not computed; codes, rollouts, usage, the policies' probabilities and "
    "each code's token are"
)


def explore(run_dir: Path, settings: Explorer | None = None) -> tuple[records.Dataset, Corpus, tuple[str, ...]]:
    """The dataset of a finished run, its rollouts, and the texts of their tokens (as ``overlap`` wants them).

    Raises:
        ValueError: the run has no rollouts of latent actions.
    """
    config = load_config(run_dir / RUN_CONFIG, [], check_paths=False)
    settings = settings or config.explorer
    before, after = policies_of(run_dir)
    shape = read_shape(after)
    corpus, stored, damage = read_corpus(run_dir, num_actions=shape.num_actions, span=shape.span)
    tokenizer = load_tokenizer(base_path(after), trust_remote_code=config.base.trust_remote_code)
    words = Vocabulary(tokenizer)
    rows = corpus.whole_groups(settings.rollouts, TOKENS_SHOWN)
    shown = corpus.subset(rows)
    for token in np.argsort(-np.bincount(shown.tokens), kind="stable")[: len(np.unique(shown.tokens))]:
        words(token)  # frequent ones get short numbers
    found = Collected(corpus=corpus, shown=shown, rows=rows, found=None, sums=None, walked=None, why=[])
    task, notes = build_task(config.task), list(damage)
    if settings.seconds > 0:
        found = with_model(found, load_models(before, after, config, tokenizer), config, settings, task, words)
        notes += _bounds(found, settings)
    else:
        notes.append(
            "explorer.seconds is 0: nothing was computed from the model; latent-control explain RUN "
            "--seconds 60 does that"
        )
    if isinstance(task, EpisodeTask):
        notes.append(PLAYED_ANEW)
    if stored > len(corpus):
        notes.append(f"counts are over {len(corpus)} of {stored} stored rollouts, spread over training")
    return _dataset(run_dir, config, task, found, words, stored, notes), corpus, _token_texts(corpus, tokenizer)


def with_model(
    some: Collected, models: Models, config: RunConfig, settings: Explorer, task: Task, words: Vocabulary
) -> Collected:
    """What needs the model, inside the time budget."""
    clock, shown = Clock(settings.seconds), some.shown
    found = read(shown, models, clock, READ_SHARE)
    sums = effects(found, shown.actions[found.choices], models, clock, EFFECTS_SHARE)
    walked = None if isinstance(task, EpisodeTask) else walk(models, config, task, clock, WALK_SHARE)
    explainer = Explainer(shown, models, config, task, words)
    why = explainer.all(to_explain(shown, np.arange(len(shown)), settings.explained)) if settings.explained else []
    return replace(some, found=found, sums=sums, walked=walked, why=why)


def _bounds(some: Collected, settings: Explorer) -> list[str]:
    """What the time budget cut off."""
    assert some.found is not None and some.sums is not None
    limit, wanted = f"explorer.seconds of {settings.seconds:g}", min(settings.explained, len(some.shown))
    parts = (
        ("policies were read at the choices of", len(some.found.rows), len(some.shown), "rollouts", limit),
        ("codes were compared at", some.sums.states, len(some.found.states), "states", limit),
        ("counterfactuals are those of", len(some.why), wanted, "rollouts", "the size of the page"),
    )
    return [
        f"{what} {n} of {planned} {unit}: {bound} allowed no more"
        for what, n, planned, unit, bound in parts
        if n < planned
    ]


# -- the parts of the dataset ------------------------------------------------------------------------------------------


def _dataset(
    run_dir: Path,
    config: RunConfig,
    task: Task,
    some: Collected,
    words: Vocabulary,
    stored: int,
    notes: Sequence[str],
) -> records.Dataset:
    codes, total = _codes(some, words)
    prompts = list(dict.fromkeys(some.shown.prompt_texts))
    training = _training(some.corpus)
    corpus = some.corpus
    rewards, successes = (ends(series(run_dir / METRICS, IMPROVE, metric)) for metric in ("reward", "success"))
    usage = np.bincount(corpus.actions[corpus.choices], minlength=corpus.num_actions) / len(corpus.choices)
    measured = gain.evaluated(run_dir, _variant_before(run_dir), "improved", config.seed)
    summary = records.Summary(
        run=run_dir.name,
        num_actions=corpus.num_actions,
        span=corpus.span,
        rollouts=len(corpus),
        stored=stored,
        choices=len(corpus.choices),
        perplexity=float(np.exp(counts.entropy(usage))),
        reward_first=rewards[0],
        reward_last=rewards[1],
        success_first=successes[0],
        success_last=successes[1],
        world=corpus.world,
        turns=float((corpus.turns[corpus.offsets[1:] - 1] + 1).mean()),
        gain=total,
        measured=measured[0] if measured else None,
        measured_prompts=measured[1] if measured else 0,
        collapse=collapse(some.found, some.sums, [code.health for code in codes]) if some.found and some.sums else None,
        path=() if some.walked is None else tuple(some.walked.rewards.tolist()),
        path_rollouts=0 if some.walked is None else int(some.walked.sizes.sum()),
        evaluation=_evaluation(run_dir),
        notes=tuple(notes),
    )
    split, rollouts, alike = splits(some, task), shown_rollouts(some, words, prompts), _clusters(some, words)
    return records.Dataset(
        summary=summary,
        vocabulary=words.texts(),  # last: the parts above have asked for their tokens
        prompts=tuple(text[-min(PROMPT_CHARACTERS, PROMPTS_CHARACTERS // len(prompts)) :] for text in prompts),
        codes=codes,
        training=training,
        splits=split,
        rollouts=rollouts,
        why=tuple(some.why),
        clusters=alike,
    )


def _variant_before(run_dir: Path) -> str:
    """The evaluation's name of the model that improve started from."""
    there = [stage for stage in behind("improved")[:-1] if (run_dir / stage_record(stage)).is_file()]
    return next((name for name, stages in MAKERS.items() if there and there[-1] in stages), "")


def _clusters(some: Collected, words: Vocabulary) -> tuple[records.CodeCluster, ...]:
    sums, codes = some.sums, some.corpus.actions[some.corpus.choices]
    if sums is None:
        return ()
    uses = np.bincount(codes, minlength=some.corpus.num_actions)
    order = [k for k in np.argsort(-uses, kind="stable").tolist() if uses[k]]
    groups = [group for group in clusters(order, sums.agreement, ALIKE) if len(group) > 1]
    return tuple(
        records.CodeCluster(codes=tuple(group), tokens=tuple(words(token) for token, _ in sums.likeliest(group[0])))
        for group in sorted(groups, key=len, reverse=True)
    )


def _codes(some: Collected, words: Vocabulary) -> tuple[tuple[records.Code, ...], records.IntervalEstimate | None]:
    corpus, n, found, sums = some.corpus, some.corpus.num_actions, some.found, some.sums
    at = corpus.choices
    taken = corpus.actions[at]
    uses = np.bincount(taken, minlength=n)
    entropies = counts.token_entropies(taken, corpus.tokens[at], n)
    advantage = np.bincount(taken, corpus.advantages[corpus.rows[at]], minlength=n) / np.maximum(uses, 1)
    where, (better, worse), named = counts.contexts(corpus), counts.ngrams(corpus), counts.labels(corpus)
    place = {int(r): i for i, r in enumerate(some.rows)}
    gains: list[records.IntervalEstimate] | None = None
    total: records.IntervalEstimate | None = None
    if (walked := some.walked) is not None:
        gains = gain.by_code(walked.codes, walked.parts, walked.prompts, walked.sizes, n)
        total = gain.estimate(walked.parts, walked.prompts, walked.sizes)

    def rows_as(kind: type[Any], rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        return tuple(_record(words, kind, row) for row in rows)

    def code(k: int, healthy: str) -> records.Code:
        return records.Code(
            usage=float(uses[k] / len(at)),
            uses=int(uses[k]),
            token_entropy=float(entropies[k]),
            health=healthy,
            advantage=float(advantage[k]) if uses[k] else None,
            before=None if found is None else float(found.before[:, k].mean()),
            after=None if found is None else float(found.after[:, k].mean()),
            gain=None if gains is None else gains[k],
            strength=None if sums is None else sums.strength(k),
            acts=None if sums is None else sums.acts(k),
            labels=rows_as(records.Label, named.get(k, ())),
            near=() if sums is None else rows_as(records.Near, sums.near(k)),
            shifts=() if sums is None else rows_as(records.Shift, sums.top(k)),
            anywhere=() if sums is None else tuple((words(t), p) for t, p in sums.likeliest(k)),
            contexts=rows_as(records.Context, [(*row[:-1], place.get(row[-1])) for row in where.get(k, [])]),
            better=rows_as(records.NGram, better.get(k, [])),
            worse=rows_as(records.NGram, worse.get(k, [])),
        )

    return tuple(code(k, healthy) for k, healthy in enumerate(counts.health(uses / len(at)))), total


def _record(words: Vocabulary, kind: type[Any], row: Sequence[Any]) -> Any:
    """A record of a code from its fields in order; tokens become numbers of the page."""
    found = dict(zip((field.name for field in fields(kind)), row, strict=True))
    if kind is records.Label and found["kind"] != "position":
        found["value"] = words(found["value"])
    for name in ("token", "tokens", "before"):
        if name in found:
            value = found[name]
            found[name] = words(value) if isinstance(value, int) else tuple(map(words, value))
    for name in ("more", "less"):
        if name in found:
            found[name] = tuple((words(token), moved) for token, moved in found[name])
    return kind(**found)


def _training(corpus: Corpus) -> records.UsageOverTraining:
    place, names = counts.points(corpus.versions)
    at = corpus.choices
    usage = counts.shares(place[corpus.rows[at]], corpus.actions[at], len(names), corpus.num_actions)
    sizes = np.bincount(place)
    return records.UsageOverTraining(
        updates=tuple(names),
        usage=counts.nested(usage),
        perplexity=tuple(np.exp(counts.entropy(usage)).tolist()),
        reward=tuple((np.bincount(place, corpus.rewards) / sizes).tolist()),
        success=tuple((np.bincount(place, corpus.success) / sizes).tolist()),
    )


def shown_rollouts(some: Collected, words: Vocabulary, prompts: list[str]) -> tuple[records.Shown, ...]:
    """The page's rollouts, with both policies' probabilities where they were read."""
    shown, found = some.shown, some.found
    chances = np.full(len(shown.tokens), -1)
    chances[shown.choices] = np.round(100 * np.exp(shown.logp[shown.choices]))
    policies = [np.full(len(shown.tokens), -1) for _ in range(2)]
    if found is not None:
        codes = shown.actions[found.choices]
        for values, p in zip(policies, (found.before, found.after), strict=True):
            values[found.choices] = np.round(100 * p[np.arange(len(codes)), codes])
    codes_or_seen = np.where(shown.generated, shown.actions, -1)
    known = set() if found is None else set(found.rows.tolist())
    number = {text: i for i, text in enumerate(prompts)}

    def one(r: int) -> records.Shown:
        cells = slice(int(shown.offsets[r]), int(shown.offsets[r + 1]))
        before, after = (tuple(values[cells].tolist()) if r in known else () for values in policies)
        return records.Shown(
            id=shown.ids[r],
            prompt=number[shown.prompt_texts[r]],
            update=int(shown.versions[r]) + 1,
            reward=float(shown.rewards[r]),
            advantage=float(shown.advantages[r]),
            success=bool(shown.success[r]),
            tokens=tuple(words(t) for t in shown.tokens[cells].tolist()),
            codes=tuple(codes_or_seen[cells].tolist()),
            chances=tuple(chances[cells].tolist()),
            before=before,
            after=after,
            turn_rewards=shown.turn_rewards[r],
        )

    return tuple(one(r) for r in range(len(shown)))


def _evaluation(run_dir: Path) -> tuple[tuple[str, float], ...]:
    result = read_json(run_dir / EVALUATION).items()
    return tuple((name, row["sampled"]) for name, row in result if isinstance(row, dict) and "sampled" in row)


def _token_texts(corpus: Corpus, tokenizer: Any) -> tuple[str, ...]:
    """The text of each choice's token [C]."""
    there, local = np.unique(corpus.tokens[corpus.choices], return_inverse=True)
    texts = [tokenizer.decode([int(token)], skip_special_tokens=False) for token in there]
    return tuple(texts[i] for i in local)


def beside(
    first: tuple[records.Dataset, Corpus, tuple[str, ...]], second: tuple[records.Dataset, Corpus, tuple[str, ...]]
) -> tuple[records.Dataset, records.Dataset]:
    """Two explored runs, each code with the most similar one of the other: by the texts they produced, as runs may
    differ in tokenizer."""
    (a, corpus_a, texts_a), (b, corpus_b, texts_b) = first, second
    number = {text: i for i, text in enumerate(dict.fromkeys((*texts_a, *texts_b)))}
    codes = [corpus.actions[corpus.choices] for corpus in (corpus_a, corpus_b)]
    tokens = [np.array([number[text] for text in texts]) for texts in (texts_a, texts_b)]
    table = counts.overlap(codes[0], tokens[0], codes[1], tokens[1], (corpus_a.num_actions, corpus_b.num_actions))
    return replace(a, similar=_nearest(table)), replace(b, similar=_nearest(table.T))


def _nearest(table: np.ndarray) -> tuple[tuple[int, float], ...]:
    return tuple((int(row.argmax()), float(row.max())) for row in table)
