"""The losses, by numbers one can add in the head and by equivalence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from latent_control.algorithms import ALGORITHMS, Outcomes
from latent_control.distributions import action_log_probs
from latent_control.losses import (
    clipped_surrogate,
    cloning_loss,
    latent_action_loss,
    negative_entropy,
    straight_through_codes,
    usage_of,
)

LN2 = math.log(2.0)


def surrogate(
    probabilities: list[float], behaviour: float, advantage: float, **settings: Any
) -> tuple[float, dict[str, float], Any]:
    """Loss, metrics and gradient on the logits for one position whose action is 0."""
    logits = torch.tensor([probabilities]).log().requires_grad_()
    loss, metrics = clipped_surrogate(
        torch.log_softmax(logits, -1),
        actions=torch.tensor([0]),
        action_logp=torch.tensor([behaviour]).log(),
        advantages=torch.tensor([advantage]),
        weights=torch.ones(1),
        **{"clip_low": 0.2, "clip_high": 0.3} | settings,
    )
    loss.backward()
    return float(loss.detach()), {name: float(value) for name, value in metrics.items()}, logits.grad


# -- clipped surrogate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "behaviour", "advantage", "loss", "clipped", "moves"),
    [
        (0.5, 0.5, 2.0, -2.0, 0.0, True),  # ratio 1
        (0.5, 0.4, 1.0, -1.25, 0.0, True),  # ratio 1.25, inside [0.8, 1.3]
        (0.5, 0.25, 1.0, -1.3, 1.0, False),  # ratio 2 with a good action: clipped at 1 + clip_high
        (0.5, 0.25, -1.0, 2.0, 1.0, True),  # ratio 2 with a bad action: the worse of the two, unclipped
        (0.5, 1.0, 1.0, -0.5, 1.0, True),  # ratio 0.5 with a good action: unclipped
        (0.5, 1.0, -1.0, 0.8, 1.0, False),  # ratio 0.5 with a bad action: clipped at 1 - clip_low
        (0.5, 0.25, 0.0, 0.0, 1.0, False),
    ],
)
def test_clipped_surrogate(
    probability: float, behaviour: float, advantage: float, loss: float, clipped: float, moves: bool
) -> None:
    found, metrics, gradient = surrogate([probability, 1 - probability], behaviour, advantage)
    assert found == pytest.approx(loss, abs=1e-6)
    assert metrics["clip_share"] == clipped
    assert metrics["ratio_mean"] == pytest.approx(probability / behaviour)
    assert metrics["logp_gap"] == pytest.approx(abs(math.log(probability / behaviour)), abs=1e-6)
    assert bool(gradient.any()) is moves


@pytest.mark.parametrize(("cap", "weight", "capped"), [(2.0, 1.6, 0.0), (1.2, 1.2, 1.0)])
def test_importance_weights_are_truncated(cap: float, weight: float, capped: float) -> None:
    """Probability 0.5 now, 0.4 at the start of the update, 0.25 when it was sampled: ratio 1.25, weight 1.6."""
    found, metrics, _ = surrogate([0.5, 0.5], 0.25, 3.0, proximal_logp=torch.tensor([0.4]).log(), importance_cap=cap)
    assert found == pytest.approx(-3.0 * 1.25 * weight, rel=1e-5)
    assert metrics["ratio_mean"] == pytest.approx(1.25) and metrics["importance_mean"] == pytest.approx(1.6)
    assert metrics["importance_capped_share"] == capped and metrics["logp_gap"] == pytest.approx(LN2)


@pytest.mark.parametrize(
    ("behaviour", "advantage", "weight"),
    [(0.25, 1.0, 1.3), (0.25, -1.0, 1.3), (1.0, -1.0, 0.8), (0.4, 2.0, 1.25)],  # ratios 2, 2, 0.5 and 1.25
)
def test_cispo_bounds_the_weight_and_keeps_the_gradient(behaviour: float, advantage: float, weight: float) -> None:
    """d/dlogits of -w A log pi(0) = -w A (onehot - pi), where PPO's has no gradient once clipped."""
    found, _, gradient = surrogate([0.5, 0.5], behaviour, advantage, surrogate="cispo")
    assert found == pytest.approx(weight * advantage * LN2, rel=1e-5)
    assert torch.allclose(gradient, -weight * advantage * torch.tensor([[0.5, -0.5]]), atol=1e-6)


def test_a_sequences_ratio_is_the_geometric_mean_of_its_actions() -> None:
    """Ratios 2 and 1/2 of one rollout are 1 together; 4 alone is clipped at 1.3."""
    probability, behaviour = torch.tensor([0.5, 0.5, 0.8]), torch.tensor([0.25, 1.0, 0.2])
    loss, metrics = clipped_surrogate(
        torch.stack([probability, 1 - probability], 1).log(),
        actions=torch.zeros(3, dtype=torch.long),
        action_logp=behaviour.log(),
        advantages=torch.tensor([3.0, 3.0, 1.0]),
        weights=torch.tensor([0.25, 0.25, 0.5]),
        clip_low=0.2,
        clip_high=0.3,
        sequences=torch.tensor([0, 0, 4]),
    )
    assert float(loss) == pytest.approx(-(0.5 * 3.0 + 0.5 * 1.3), rel=1e-5)
    assert float(metrics["ratio_mean"]) == pytest.approx(0.5 + 0.5 * 4.0) and metrics["clip_share"] == 0.5


def test_at_ratio_one_the_gradient_is_that_of_reinforce() -> None:
    _, _, gradient = surrogate([0.25, 0.75], 0.25, 2.0)
    # d/dlogits of -A log pi(0) = -A (onehot - pi)
    assert torch.allclose(gradient, -2.0 * torch.tensor([[0.75, -0.75]]))


def test_exact_entropy() -> None:
    loss, metrics, _ = surrogate([0.5, 0.25, 0.25], 0.5, 0.0, entropy_coefficient=0.1)
    assert metrics["entropy"] == pytest.approx(1.5 * LN2)
    assert loss == pytest.approx(-0.15 * LN2)


def test_exact_kl() -> None:
    reference = torch.tensor([[0.25, 0.75]]).log()
    loss, metrics, _ = surrogate([0.5, 0.5], 0.5, 0.0, kl_coefficient=2.0, reference_log_probs=reference)
    assert metrics["kl_to_reference"] == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)  # ½ ln 2 + ½ ln ⅔
    assert loss == pytest.approx(math.log(4 / 3), rel=1e-5)


def test_kl_to_itself_is_zero_and_has_no_gradient() -> None:
    reference = torch.tensor([[0.3, 0.7]]).log()
    loss, metrics, gradient = surrogate([0.3, 0.7], 0.3, 0.0, kl_coefficient=1.0, reference_log_probs=reference)
    assert loss == pytest.approx(0.0, abs=1e-7) and metrics["kl_to_reference"] == pytest.approx(0.0, abs=1e-7)
    assert torch.allclose(gradient, torch.zeros(1, 2), atol=1e-7)


def test_without_kl_coefficient_the_reference_does_not_move_the_policy() -> None:
    reference = torch.tensor([[0.1, 0.9]]).log()
    loss, metrics, gradient = surrogate([0.5, 0.5], 0.5, 0.0, reference_log_probs=reference)
    assert loss == 0.0 and not gradient.any() and metrics["kl_to_reference"] > 0


def test_truncated_distribution_gives_finite_gradients() -> None:
    """With top-k most log-probabilities are -inf; none of entropy, KL or surrogate may turn them into NaN."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[0.0, 1.0, 0.5, 2.0]])
    actions = torch.tensor([0])
    loss, metrics = clipped_surrogate(
        action_log_probs(logits, top_k=2, keep=actions),
        actions=actions,
        action_logp=torch.tensor([-0.5]),
        advantages=torch.tensor([1.0]),
        weights=torch.ones(1),
        clip_low=0.2,
        clip_high=0.2,
        kl_coefficient=0.1,
        entropy_coefficient=0.1,
        full_log_probs=action_log_probs(logits),
        reference_log_probs=action_log_probs(reference),
    )
    loss.backward()
    assert all(torch.isfinite(value) for value in metrics.values())
    assert torch.isfinite(logits.grad).all() and logits.grad.any()
    kept = torch.softmax(torch.tensor([2.0, 1.0]), -1)
    assert float(metrics["entropy"]) == pytest.approx(-float((kept * kept.log()).sum()))
    p, q = torch.softmax(logits[0].detach(), -1), torch.softmax(reference[0], -1)
    assert float(metrics["kl_to_reference"]) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_weights_share_out_the_mean() -> None:
    log_probs = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    loss, metrics = clipped_surrogate(
        log_probs,
        actions=torch.tensor([0, 1]),
        action_logp=torch.tensor([0.5, 0.5]).log(),
        advantages=torch.tensor([4.0, -8.0]),
        weights=torch.tensor([0.75, 0.25]),
        clip_low=0.2,
        clip_high=0.2,
    )
    assert float(loss) == pytest.approx(-(0.75 * 4 - 0.25 * 8))
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0)


# -- invariant 5: the analytic policy gradient -------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 2.0]])  # [states, actions]


def of_groups(algorithm: str, rewards: torch.Tensor) -> torch.Tensor:
    """Advantages [B] of rollouts of one action with rewards [P, G]."""
    count = rewards.numel()
    everywhere = torch.ones(count, dtype=torch.bool)
    outcomes = Outcomes(
        rewards=rewards.flatten(), valid=everywhere, group_size=rewards.shape[1], taken=everywhere[:, None]
    )
    return ALGORITHMS[algorithm].estimate(outcomes).advantages[:, 0]


def expected_gradient(theta: torch.Tensor, group_size: int) -> torch.Tensor:
    """The expectation of the RLOO gradient over all groups of a two-state bandit, by enumeration."""
    states, count = theta.shape
    behaviour = torch.log_softmax(theta, -1)
    total = torch.zeros_like(theta)
    for state in range(states):
        for actions in torch.cartesian_prod(*[torch.arange(count)] * group_size).view(-1, group_size):
            chance = behaviour[state, actions].sum().exp() / states
            advantages = of_groups("rloo", REWARDS[state, actions][None])
            logits = theta.clone().requires_grad_()
            loss, _ = clipped_surrogate(
                torch.log_softmax(logits[state], -1).expand(group_size, -1),
                actions=actions,
                action_logp=behaviour[state, actions],
                advantages=advantages,
                weights=torch.full((group_size,), 1 / group_size),
                clip_low=0.2,
                clip_high=0.2,
            )
            total += chance * torch.autograd.grad(loss, logits)[0]
    return total


@pytest.mark.parametrize("group_size", [2, 3])
def test_expected_gradient_is_the_analytic_policy_gradient(group_size: int) -> None:
    theta = torch.tensor([[0.2, -0.4, 0.9], [1.0, 0.0, -0.5]])
    policy = torch.softmax(theta, -1)
    # dJ/dtheta[s, a] = p(s) pi(a|s) (r(s, a) - sum_b pi(b|s) r(s, b)), with p(s) = 1/2
    analytic = 0.5 * policy * (REWARDS - (policy * REWARDS).sum(-1, keepdim=True))
    assert torch.allclose(expected_gradient(theta, group_size), -analytic, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["dr_grpo", "grpo", "reinforce_pp", "rloo"])
def test_following_the_gradient_finds_the_best_actions(algorithm: str) -> None:
    theta = torch.zeros(2, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        behaviour = torch.log_softmax(theta, -1)
        actions = torch.multinomial(behaviour.exp(), 8, replacement=True, generator=generator)  # [states, group]
        advantages = of_groups(algorithm, REWARDS.gather(1, actions))
        logits = theta.clone().requires_grad_()
        loss, _ = clipped_surrogate(
            torch.log_softmax(logits, -1).repeat_interleave(8, 0),
            actions=actions.flatten(),
            action_logp=behaviour.gather(1, actions).flatten(),
            advantages=advantages,
            weights=torch.full((16,), 1 / 16),
            clip_low=0.2,
            clip_high=0.2,
        )
        theta = theta - 1.0 * torch.autograd.grad(loss, logits)[0]
    assert theta.argmax(-1).tolist() == REWARDS.argmax(-1).tolist()
    assert float(torch.softmax(theta, -1).max(-1).values.min()) > 0.9


def test_grpo_differs_from_rloo_by_a_positive_scale_per_group() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 4.0]])
    scale = of_groups("grpo", rewards) / of_groups("rloo", rewards)
    assert torch.allclose(scale, scale[0].expand_as(scale)) and scale[0] > 0


# -- cloning -----------------------------------------------------------------------------------------------------------


def test_soft_cloning_is_the_kl_from_the_targets() -> None:
    targets, policy = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    loss, _ = cloning_loss(policy, targets, soft=True, positions=2)
    # ½ ln 2 + ½ ln ⅔ at one of two positions
    assert float(loss) == pytest.approx(0.5 * 0.5 * math.log(4 / 3), rel=1e-5)


def test_hard_cloning_is_the_cross_entropy_with_the_argmax() -> None:
    targets, policy = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log(), torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    loss, metrics = cloning_loss(policy, targets, soft=False, positions=2)
    assert float(loss) == pytest.approx((LN2 + 2 * LN2) / 2)
    assert float(metrics["agreement"]) == 0.5  # the tie goes to code 0, which is the label; the second position differs


@pytest.mark.parametrize("soft", [True, False])
def test_cloning_in_microbatches_adds_up(soft: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    policy, targets = torch.randn(10, 4, generator=generator), torch.randn(10, 4, generator=generator)
    whole, metrics = cloning_loss(policy, targets, soft=soft, positions=10)
    parts = [cloning_loss(policy[rows], targets[rows], soft=soft, positions=10) for rows in (slice(0, 3), slice(3, 10))]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), rel=1e-5)
    assert float(sum(m["agreement"] for _, m in parts)) == pytest.approx(float(metrics["agreement"]))


# -- latent actions ----------------------------------------------------------------------------------------------------


def test_latent_action_loss_by_hand() -> None:
    logits = torch.zeros(2, 2)
    soft = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    arguments: dict[str, Any] = {"usage": torch.tensor([0.5, 0.5]), "positions": 2.0}
    prediction, metrics = latent_action_loss(
        torch.tensor([1.0, 3.0]), logits, soft, usage_weight=0.0, entropy_weight=0.0, **arguments
    )
    assert float(prediction) == 2.0 == float(metrics["nll_sampled_codes"])
    usage, _ = latent_action_loss(torch.zeros(2), logits, soft, usage_weight=1.0, entropy_weight=0.0, **arguments)
    assert float(usage) == pytest.approx(1.0 - LN2)  # sum qbar log qbar = -ln 2, and its linearisation adds sum q = 1
    entropy, _ = latent_action_loss(torch.zeros(2), logits, soft, usage_weight=0.0, entropy_weight=1.0, **arguments)
    assert float(entropy) == pytest.approx(-LN2 / 2)  # -ln 2 at one of two positions; 0 log 0 = 0 at the other


@pytest.mark.parametrize("cuts", [[12], [5, 7], [1, 1, 10], [4, 4, 4]])
def test_usage_term_in_microbatches_has_the_gradient_of_the_whole_batch(cuts: list[int]) -> None:
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mean = torch.softmax(logits, -1).mean(0)
    (wanted,) = torch.autograd.grad(0.7 * (mean * mean.log()).sum(), logits)
    usage = (usage_of(logits) / 12).detach()
    found = torch.zeros_like(wanted)
    for part in torch.arange(12).split(cuts):
        loss, _ = latent_action_loss(
            torch.zeros(len(part)),
            logits[part],
            torch.softmax(logits[part], -1).detach(),
            usage=usage,
            usage_weight=0.7,
            entropy_weight=0.0,
            positions=12.0,
        )
        found += torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(found, wanted, atol=1e-7)


def test_usage_gradient_survives_a_dead_code() -> None:
    logits = torch.tensor([[0.0, 0.0, -1e4]], requires_grad=True)
    loss, _ = latent_action_loss(
        torch.zeros(1), logits, torch.tensor([[0.5, 0.5, 0.0]]), usage=usage_of(logits.detach()), usage_weight=1.0,
        entropy_weight=1.0, positions=1.0,
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_negative_entropy_has_no_nan_at_zero() -> None:
    assert negative_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == pytest.approx([0.0, -LN2])


# -- straight-through codes --------------------------------------------------------------------------------------------


def test_straight_through_is_one_hot_forward_and_soft_backward() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    values = torch.randn(4, 2, generator=torch.Generator().manual_seed(4))
    hard, soft = straight_through_codes(logits, 0.7, torch.Generator().manual_seed(5))
    assert torch.allclose(hard.detach(), torch.eye(4)[soft.argmax(-1)], atol=1e-6)
    assert torch.allclose(soft.sum(-1), torch.ones(6))
    (through_hard,) = torch.autograd.grad((hard @ values).sum(), logits, retain_graph=True)
    (through_soft,) = torch.autograd.grad((soft @ values).sum(), logits)
    assert torch.equal(through_hard, through_soft) and through_hard.any()


def test_straight_through_samples_the_distribution_of_the_logits() -> None:
    """Gumbel-max: at any temperature the hard choice is a draw from softmax(logits)."""
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    hard, _ = straight_through_codes(probabilities.log().expand(20_000, 3), 2.0, torch.Generator().manual_seed(6))
    assert torch.allclose(hard.mean(0), probabilities, atol=0.015)  # four standard deviations


def test_temperature_sharpens_the_relaxed_codes_without_changing_the_choice() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(7))
    warm, cold = (straight_through_codes(logits, tau, torch.Generator().manual_seed(8)) for tau in (2.0, 0.1))
    assert torch.equal(warm[1].argmax(-1), cold[1].argmax(-1))
    assert cold[1].max(-1).values.mean() > warm[1].max(-1).values.mean() + 0.2


def test_same_generator_same_codes() -> None:
    logits = torch.zeros(5, 3)
    first, second = (straight_through_codes(logits, 1.0, torch.Generator().manual_seed(9))[0] for _ in range(2))
    assert torch.equal(first, second)
