"""Policy-gradient algorithms by name; each is an estimator of advantages, all share the clipped surrogate
(``losses``)."""

from latent_control.algorithms.common import AdvantageEstimate, Algorithm, Outcomes
from latent_control.algorithms.grpo import DR_GRPO, GRPO
from latent_control.algorithms.ppo import PPO
from latent_control.algorithms.reinforce_pp import REINFORCE_PP
from latent_control.algorithms.remax import REMAX
from latent_control.algorithms.rloo import RLOO

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "rloo": RLOO,
    "remax": REMAX,
    "reinforce_pp": REINFORCE_PP,
    "ppo": PPO,
}

__all__ = ["ALGORITHMS", "AdvantageEstimate", "Algorithm", "Outcomes"]
