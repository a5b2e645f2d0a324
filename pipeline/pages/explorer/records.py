"""Plain data of the explorer's page. Axes: N codes, K keys (positions, kinds of prompts, ...), U points in
training.

Tokens are numbers of ``Dataset.vocabulary``, rollouts places in ``Dataset.rollouts``. Shares and probabilities are
between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shift:
    """The effect of a code on one token. ``Shift(token=7, probability=0.9, mixture=0.1, log_shift=2.2)``."""

    token: int
    probability: float
    """Under the code, mean over the states where it was chosen."""
    mixture: float
    """Under the mixture of all codes that the policy before RL makes, over the same states."""
    log_shift: float
    """Log of the ratio of the two."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a code fires. ``Context(before=(4, 9), token=2, count=31, share=0.6, rollout=12)``."""

    before: tuple[int, ...]
    token: int
    """The first one the code produced there."""
    count: int
    share: float
    """Of the times this context and token occurred, those with this code."""
    rollout: int | None
    """An example among the rollouts of the page."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a code does in words. ``Label(kind="writes", value=7, here=0.9, elsewhere=0.1, z=12.0)``."""

    kind: str
    """``writes`` a token, at ``position`` of the response, ``after`` a token."""
    value: int
    """That token or position."""
    here: float
    """Share of the code's choices."""
    elsewhere: float
    """Share of all other codes' choices."""
    z: float
    """Log odds ratio of the two, in standard errors."""


@dataclass(frozen=True, kw_only=True)
class Near:
    """A code beside another one. ``Near(code=7, agreement=0.9, more=((3, 0.2),), less=((5, 0.1),))``."""

    code: int
    agreement: float
    """Share of the states at which both have the same top token."""
    more: tuple[tuple[int, float], ...]
    """Tokens that the first code makes likelier than this one does: (token, difference of mean probabilities)."""
    less: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class CodeCluster:
    """Codes that have the top token of the first one in most states: ``CodeCluster(codes=(3, 9), tokens=(7,))``."""

    codes: tuple[int, ...]
    tokens: tuple[int, ...]
    """The first one's likeliest, in all states."""


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Whether reinforcement learning collapsed the codebook; pairs are before and after it, at the same choices.

    ``Collapse(marginal=(50.1, 41.0), state=(9.0, 3.1), strength=0.8, active=60, probed=60,
    acting=55, distinct=40, verdict="no
    collapse", reasons=())``
    """

    marginal: tuple[float, float]
    """exp(entropy of the policy's mean over all states): how many codes are in use altogether."""
    state: tuple[float, float]
    """exp(mean entropy of the policy in one state): how many codes are open there."""
    strength: float | None
    """KL(token | code, token | mixture) in nats, mean over the probed states of all codes."""
    active: int
    probed: int
    """Active codes with a probed state."""
    acting: int
    """Of these, those that change the top token in some of them."""
    distinct: int
    """Active codes when near-duplicates count once."""
    verdict: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NGram:
    """Codes one after the other, in good and in bad rollouts. ``NGram(codes=(3, 9), tokens=(4, 8), high=40, low=5,
    z=5.1)``."""

    codes: tuple[int, ...]
    tokens: tuple[int, ...]
    """What they wrote most often."""
    high: int
    """How often in rollouts with more reward than the mean of their group."""
    low: int
    z: float
    """Log odds ratio of high against low, in standard errors."""


@dataclass(frozen=True, kw_only=True)
class IntervalEstimate:
    """A number with its 95 % interval. ``IntervalEstimate(mean=0.02, low=0.01, high=0.03)``."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Code:
    """One latent action."""

    usage: float
    """Share of all choices."""
    uses: int
    token_entropy: float
    """Entropy in nats of the tokens it produced."""
    health: str
    """``active``, ``rare`` (no more than a tenth of 1 / N) or ``unused``."""
    advantage: float | None
    """Mean reward above their groups' of the rollouts that use it, once for each use."""
    before: float | None = None
    """Mean probability under the policy before RL, over the choices of the page's rollouts."""
    after: float | None = None
    gain: IntervalEstimate | None = None
    """Its part of what RL gained in reward."""
    strength: float | None = None
    """KL(token | code, token | mixture) in nats, mean over the states where it was chosen."""
    acts: float | None = None
    """Share of these states where its top token is not the mixture's: an active code may do nothing."""
    labels: tuple[Label, ...] = ()
    """What tells its choices from all others, the surest first."""
    near: tuple[Near, ...] = ()
    """The codes most like it, the nearest first."""
    shifts: tuple[Shift, ...] = ()
    anywhere: tuple[tuple[int, float], ...] = ()
    """Top tokens at states of all codes: (token, mean probability)."""
    contexts: tuple[Context, ...] = ()
    better: tuple[NGram, ...] = ()
    worse: tuple[NGram, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UsageOverTraining:
    """Codes over training, U points of neighbouring updates."""

    updates: tuple[str, ...]
    """``"1-3"``"""
    usage: tuple[tuple[float, ...], ...]
    """[U, N]"""
    perplexity: tuple[float, ...]
    """exp(entropy of usage)"""
    reward: tuple[float, ...]
    success: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Codes by some property of where they were chosen, K kinds of it.

    ``Split(name="position", keys=("0", "1"), counts=(50, 48), usage=((0.5, 0.5), (0.1, 0.9)))``
    """

    name: str
    keys: tuple[str, ...]
    counts: tuple[int, ...]
    """Choices of each kind."""
    usage: tuple[tuple[float, ...], ...]
    """[K, N]"""
    before: tuple[tuple[float, ...], ...] = ()
    """[K, N], mean probability under the policy before RL; empty when no model was read."""
    after: tuple[tuple[float, ...], ...] = ()
    gain: tuple[tuple[float, ...], ...] = ()
    """[K, N], sums to the codes' gains; of positions only."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One rollout of the page."""

    id: str
    prompt: int
    update: int
    """The one it was sampled for, counted from 1 as in ``metrics.jsonl``."""
    reward: float
    advantage: float | None
    """``None``: it is in no group."""
    success: bool
    tokens: tuple[int, ...]
    codes: tuple[int, ...]
    """-1 at tokens that an episode of several turns observed"""
    chances: tuple[int, ...]
    """Percent, under the policy that sampled; -1 inside a span, and at observed tokens."""
    before: tuple[int, ...] = ()
    """Percent, under the policy before RL; empty when no model was read."""
    after: tuple[int, ...] = ()
    turn_rewards: tuple[float, ...] = ()
    """Of each turn of an episode; empty for a single response."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A code at one choice: how likely it is, and the token it would have produced."""

    code: int
    before: float
    after: float
    token: int
    certainty: float
    """Probability of that token under the world model."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a rollout would have gone on after a code, choosing greedily from there."""

    code: int
    tokens: tuple[int, ...]
    """From this choice on."""
    reward: float | None
    """``None``: the verifier could not judge."""
    success: bool


@dataclass(frozen=True, kw_only=True)
class ExplainedChoice:
    """One choice of a rollout explained."""

    position: int
    options: tuple[Option, ...]
    """The likeliest codes, and the one that was chosen."""
    masses: tuple[tuple[int, float, float, int], ...]
    """(token, its probability before RL, after RL, number of codes), summed over all codes that produce it; the
    likeliest first."""
    endings: tuple[Ending, ...]
    """The first one is that of the chosen code."""


@dataclass(frozen=True, kw_only=True)
class Why:
    """A rollout with every choice explained."""

    rollout: int
    steps: tuple[ExplainedChoice, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the page is made of."""

    run: str
    num_actions: int
    span: int
    rollouts: int
    """Read for the counts."""
    stored: int
    """In the replay buffer."""
    choices: int
    perplexity: float
    reward_first: float
    """Mean over the first updates (``runs.metrics_log.ends``), as in ``summary.json``."""
    reward_last: float
    success_first: float
    success_last: float
    world: str
    """Hash of codebook and merge module: codes of runs with another one mean something else."""
    turns: float = 1.0
    """Mean number of responses in a rollout."""
    gain: IntervalEstimate | None = None
    """Sum over the codes."""
    measured: IntervalEstimate | None = None
    """The same by the evaluation: mean reward after minus before RL, one sampled rollout of each held-out prompt."""
    measured_prompts: int = 0
    collapse: Collapse | None = None
    path: tuple[float, ...] = ()
    """Mean reward of the rollouts that the gain is from, from near the policy before RL to near the one after it."""
    path_rollouts: int = 0
    evaluation: tuple[tuple[str, float], ...] = ()
    """Sampled success on held-out prompts by model."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Everything of one run."""

    summary: Summary
    vocabulary: tuple[str, ...]
    prompts: tuple[str, ...]
    codes: tuple[Code, ...]
    """N"""
    training: UsageOverTraining
    splits: tuple[Split, ...]
    rollouts: tuple[Shown, ...]
    why: tuple[Why, ...] = ()
    clusters: tuple[CodeCluster, ...] = ()
    """Of two codes and more, the largest first."""
    similar: tuple[tuple[int, float], ...] = ()
    """Beside another run: for each code, that run's most similar one and their overlap."""
