"""Off-policy evaluation: what a policy would earn, from rollouts of other policies with their stored log-probabilities.

Axes: R rollouts, P prompts, S bootstrap draws. A rollout's weight is w = prod_t pi(a_t | s_t) / b(a_t | s_t), with b
the policy (or policies, where it changed in flight) that chose its actions; rollouts of many policy versions may be
mixed, because each brings its own b. Rewards come at the end of a rollout, so per-decision importance sampling (Precup
et al., 2000), which leaves later ratios out of earlier rewards, is the same as the trajectory's. Left out: sums over
the codes that emit the same token, which would shrink the weights' variance but need b's whole distribution, of which
only the sampled action's part is stored.

The reward model of the doubly robust estimators is the mean reward of the prompt's *other* rollouts, shrunk towards
that of all other prompts. Given the prompt it is independent of the rollout it is used for, whatever it says, so ``dr``
is unbiased (cross-fitting, Chernozhukov et al., 2018); it needs no features, and difficulty differs between prompts
more than anything else.

All of this holds for policies that were not trained on the rollouts they are judged by. With many codes for the same
token a policy learns the very codes of its training rollouts, so that their weights say that it found what it was
given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SHRINKAGE = 2.0
"""The reward model counts the mean over the other prompts like this many rollouts of the prompt itself."""
FEWEST_EFFECTIVE = 100.0
"""Below this many effective rollouts no estimate is to be trusted."""
LARGEST_SHARE = 0.1
"""Nor where one rollout has more than this share of all weight."""
LEAST_TRUNCATED = 0.5
"""Nor where truncated weights average less: most of what the policy does is not in them."""
LARGEST_RATIO = 300.0
"""Of log-ratios: larger ones say no more, and their squares overflow."""
RECOMMENDED = "dr"
Sums = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Logged:
    """Rollouts of other policies, seen from the one to be evaluated.

    ``Logged(log_ratios=np.zeros(3), rewards=np.array([0., 1., 1.]), prompts=np.array([0, 0, 1]))``
    """

    log_ratios: np.ndarray
    """[R], sum over a rollout's actions of log pi - log b"""
    rewards: np.ndarray
    """[R]"""
    prompts: np.ndarray
    """[R] int, 0 .. P - 1: which prompt; rollouts of one prompt stand or fall together in the bootstrap"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its bootstrap interval. ``Estimate(value=0.41, low=0.37, high=0.45)``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class OffPolicyReport:
    """What can be said of a policy from other policies' rollouts."""

    rollouts: int
    prompts: int
    behaviour: Estimate
    """The mean reward of the rollouts themselves."""
    estimates: dict[str, Estimate]
    """The policy's value, by estimator."""
    gains: dict[str, Estimate]
    """The same minus ``behaviour``, paired over the bootstrap draws."""
    effective: float
    """Kish's effective number of rollouts, (sum w)^2 / sum w^2."""
    largest_share: float
    """The largest weight's share of their sum."""
    mean_weight: Estimate
    """1 in expectation when weights are not truncated; less when what the policy would do was hardly ever sampled."""
    weight_cap: float | None

    @property
    def doubts(self) -> list[str]:
        """Why the estimates should not be trusted; empty when nothing speaks against them."""
        found = []
        if self.effective < FEWEST_EFFECTIVE:
            found.append(
                f"only {self.effective:.0f} effective rollouts of {self.rollouts} (fewer than {FEWEST_EFFECTIVE:.0f})"
            )
        if self.largest_share > LARGEST_SHARE:
            found.append(f"one rollout has {self.largest_share:.0%} of all weight (more than {LARGEST_SHARE:.0%})")
        weight = self.mean_weight
        least, most = (1.0, 1.0) if self.weight_cap is None else (LEAST_TRUNCATED, math.inf)
        if weight.high < least or weight.low > most:
            found.append(
                f"weights average {weight.value:.2f} ({weight.low:.2f} to {weight.high:.2f}), not 1: the policy does "
                "what was not tried"
            )
        return found


def importance_weights(log_ratios: np.ndarray, cap: float | None = None) -> np.ndarray:
    """exp(log_ratios) [R], truncated at ``cap`` (Ionides, 2008): less variance, a bias towards the behaviour's
    low-weight rollouts."""
    weights: np.ndarray = np.exp(np.minimum(log_ratios, LARGEST_RATIO))
    return weights if cap is None else np.minimum(weights, cap)


def expected_rewards(rewards: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The reward model q [R]: mean of the prompt's other rollouts, shrunk by ``SHRINKAGE`` to the mean over all other
    prompts."""
    count, total = np.bincount(prompts), np.bincount(prompts, rewards)
    outside = (rewards.sum() - total) / np.maximum(len(rewards) - count, 1)
    others = (total[prompts] - rewards, count[prompts] - 1)
    return (others[0] + SHRINKAGE * outside[prompts]) / (others[1] + SHRINKAGE)


def prompt_sums(logged: Logged, cap: float | None = None) -> Sums:
    """What every estimator is made of, summed per prompt, each [P]."""
    w, q, r = (
        importance_weights(logged.log_ratios, cap),
        expected_rewards(logged.rewards, logged.prompts),
        logged.rewards,
    )
    terms = {"n": np.ones_like(w), "r": r, "w": w, "wr": w * r, "q": q, "wd": w * (r - q)}
    return {name: np.bincount(logged.prompts, values) for name, values in terms.items()}


def weight_sum(s: Sums) -> np.ndarray:
    """The sum of weights, to divide by: more than 0."""
    return np.maximum(s["w"], np.finfo(float).tiny)


def ips(s: Sums) -> np.ndarray:
    """Inverse propensity scoring over whole rollouts (Horvitz & Thompson, 1952): unbiased, and of the largest
    variance."""
    return s["wr"] / s["n"]


def wis(s: Sums) -> np.ndarray:
    """The same with weights that sum to one (Hajek, 1971): a little biased, never outside the rewards' range."""
    return s["wr"] / weight_sum(s)


def dr(s: Sums) -> np.ndarray:
    """Doubly robust (Dudik et al., 2011): the reward model, corrected by the weighted residuals; unbiased."""
    return (s["q"] + s["wd"]) / s["n"]


def wdr(s: Sums) -> np.ndarray:
    """Doubly robust with self-normalised weights (Thomas & Brunskill, 2016)."""
    return s["q"] / s["n"] + s["wd"] / weight_sum(s)


ESTIMATORS: dict[str, Callable[[Sums], np.ndarray]] = {"ips": ips, "wis": wis, "dr": dr, "wdr": wdr}


def resampled(sums: Sums, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Totals over bootstrap draws of whole prompts, each [S]: a prompt that is drawn comes with all its rollouts."""
    rng, prompts = np.random.default_rng(seed), len(sums["n"])
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    return {name: counts @ values for name, values in sums.items()}


def off_policy_report(
    logged: Logged, *, cap: float | None = None, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> OffPolicyReport:
    """Every estimator with percentile intervals at ``level`` from a bootstrap over prompts.

    The intervals speak of prompts like these; for the mean over these very prompts they are wider than they need be.

    Raises:
        ValueError: fewer than two prompts.
    """
    sums = prompt_sums(logged, cap)
    if len(sums["n"]) < 2:
        raise ValueError(
            "rollouts of fewer than two prompts: there is nothing to resample; give a larger replay buffer"
        )
    totals, samples = {name: values.sum() for name, values in sums.items()}, resampled(sums, draws, seed)

    def estimate(measure: Callable[[Sums], np.ndarray]) -> Estimate:
        low, high = np.quantile(measure(samples), [(1 - level) / 2, (1 + level) / 2])
        return Estimate(value=float(measure(totals)), low=float(low), high=float(high))

    weights = importance_weights(logged.log_ratios, cap)
    shares = weights / max(weights.sum(), np.finfo(float).tiny)
    return OffPolicyReport(
        rollouts=len(logged.rewards),
        prompts=len(sums["n"]),
        behaviour=estimate(behaviour_mean),
        estimates={name: estimate(measure) for name, measure in ESTIMATORS.items()},
        gains={name: estimate(_gain(measure)) for name, measure in ESTIMATORS.items()},
        effective=float(1 / (shares**2).sum()) if weights.any() else 0.0,
        largest_share=float(shares.max()),
        mean_weight=estimate(lambda s: s["w"] / s["n"]),
        weight_cap=cap,
    )


def behaviour_mean(s: Sums) -> np.ndarray:
    """Mean reward of the rollouts as they were sampled."""
    return s["r"] / s["n"]


def _gain(measure: Callable[[Sums], np.ndarray]) -> Callable[[Sums], np.ndarray]:
    return lambda s: measure(s) - behaviour_mean(s)


def verdict(
    report: OffPolicyReport,
    estimator: str = RECOMMENDED,
    at_least: float | None = None,
    more_doubts: Sequence[str] = (),
) -> tuple[str, str]:
    """("yes" | "no" | "unknown", the sentence): may the policy go online?

    Yes when the interval's lower end reaches ``at_least`` or, without one, shows a gain over the behaviour policy.
    """
    found, gain = report.estimates[estimator], report.gains[estimator]
    if doubts := [*more_doubts, *report.doubts]:
        return (
            "unknown",
            f"cannot tell: {'; '.join(doubts)}. Judge it by rollouts it was not trained on, of a policy nearer to it",
        )
    text = f"{estimator} {found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
    if at_least is not None:
        good = found.low >= at_least
        return (
            ("yes", f"may go online: {text} is at least {at_least:g}")
            if good
            else ("no", f"not yet: {text} is not surely {at_least:g}")
        )
    text += f", gain over the behaviour policy {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
    if gain.low > 0:
        return "yes", f"may go online: {text}"
    return "no", f"keep it offline: {text} is {'a loss' if gain.high < 0 else 'not surely above zero'}"
