"""The central learner: RLlib's TorchLearner with the clipped surrogate over latent actions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from configs.schema import Improve
from latent_control.base_lm import BaseLM, load_base
from latent_control.decoding.rescoring import mismatch_bound
from latent_control.distributions import action_log_probs, rollout_seed
from latent_control.losses import Metrics, clipped_surrogate, kl_divergence, value_loss
from latent_control.pretrained import base_path
from learners.collate import Batch, Collate, events_at, support_at
from learners.learning_rate import learning_rate_share
from learners.rl_module import PolicyModule, build_policy
from learners.settings import KEY, Fault, LearnerSettings
from learners.sharding import whole

Frozen = TypeVar("Frozen", bound=torch.nn.Module)

# Padding may add this share to the real tokens of a pass, or anything to a pass of so few tokens, which costs less than
# another pass. Measured: with lengths of 24 + 4 to 64 an update takes 0.53 (SmolLM2) and 0.86 (0.9 M parameters) of the
# time of one pass.
PADDING, SMALL_PASS = 0.1, 512


def position_weights(
    mask: torch.Tensor, loss_mean: str, average: Callable[[torch.Tensor], torch.Tensor] = lambda count: count
) -> torch.Tensor:
    """Each loss position's share in the mean over a minibatch, [B, T] summing to 1: equal for sequences, else equal for
    tokens.

    ``average`` takes a count's mean over all learners: since DDP averages their gradients, positions then count the
    same on every learner, however many each of them has.
    """
    mask = mask.float()
    if loss_mean != "sequence":
        return mask / average(mask.sum()).clamp(min=1e-6)
    lengths = mask.sum(1, keepdim=True)
    return mask / lengths.clamp(min=1) / average((lengths > 0).float().sum()).clamp(min=1e-6)


def constant_scale(
    mask: torch.Tensor, longest: int, average: Callable[[torch.Tensor], torch.Tensor] = lambda count: count
) -> torch.Tensor:
    """What turns a mean over tokens into their sum divided by ``longest`` times the number of rollouts, a constant, so
    that no token counts less for being part of a long rollout (Liu et al., 2025, "Dr. GRPO"); mask [B, T] -> scalar.

    Rollouts without a loss position are not counted.
    """
    rollouts = average(mask.any(1).float().sum())
    return average(mask.float().sum()) / (longest * rollouts).clamp(min=1e-6)


def microbatches(lengths: torch.Tensor, most_tokens: int) -> list[torch.Tensor]:
    """Row numbers in chunks of similar length whose padded size stays under ``most_tokens`` (one row at least).

    A chunk also ends where its padding would grow beyond ``PADDING`` of its real tokens, unless it is small.
    """
    order = lengths.argsort(descending=True).tolist()
    sizes = lengths.tolist()
    chunks: list[torch.Tensor] = []
    while order:
        longest, real, rows = sizes[order[0]], sizes[order[0]], 1
        for row in order[1:]:
            padded, real = (rows + 1) * longest, real + sizes[row]
            if padded > most_tokens or padded > max(SMALL_PASS, real * (1 + PADDING)):
                break
            rows += 1
        chunks.append(torch.tensor(order[:rows], device=lengths.device))
        order = order[rows:]
    return chunks


def surrogate_loss(
    improve: Improve,
    sampling: Mapping[str, Any],
    batch: Batch,
    logits: torch.Tensor,
    *,
    reference: torch.Tensor | None,
    full: torch.Tensor | None,
) -> tuple[torch.Tensor, Metrics]:
    """``clipped_surrogate`` of a microbatch with the policy's logits [M, N]; ``reference`` and ``full`` are its
    log-probabilities without truncation, where a KL asks for them."""
    mask, proximal = batch[Columns.LOSS_MASK], batch.get("proximal_logp")
    actions = batch[Columns.ACTIONS][mask]
    return clipped_surrogate(
        action_log_probs(logits, keep=actions, support=support_at(batch), **sampling),
        actions=actions,
        action_logp=batch[Columns.ACTION_LOGP][mask],
        advantages=batch[Columns.ADVANTAGES][mask],
        weights=batch["weights"][mask],
        clip_low=improve.clip_low,
        clip_high=improve.clip_high,
        kl_coefficient=improve.kl_coefficient,
        entropy_coefficient=improve.entropy_coefficient,
        reference_log_probs=reference,
        full_log_probs=full,
        proximal_logp=None if proximal is None else proximal[mask],
        importance_cap=improve.importance_cap or math.inf,
        events=events_at(batch, logits.shape[1]),
        sequences=mask.nonzero()[:, 0] if improve.ratio == "sequence" else None,
        surrogate=improve.surrogate,
    )


class PolicyLearner(TorchLearner):
    """Trains what ``PolicyModule`` holds, as ``LearnerSettings`` say."""

    # Of the update under way:
    _steps_taken: int
    _broken: float
    _far: bool
    # Of the optimiser step under way:
    _sums: dict[str, torch.Tensor | float]
    _scale: torch.Tensor | float
    _mismatch_bound: float

    def build(self) -> None:
        """Build the module, then the connector, which needs the device and maybe base LM and reference policy."""
        super().build()
        own, self.improve = self.settings, self.settings.improve
        base = self._base() if own.recompute and own.reads != "tokens" else None
        reference = self._placed(build_policy(**own.module).eval()) if self.improve.kl_coefficient > 0 else None
        self.reference = reference if self.improve.kl_in == "loss" else None
        connector = Collate(
            improve=self.improve,
            device=self._device,
            base=base,
            reads=own.reads,
            span=own.span,
            sampling=own.sampling,
            module=self.module[DEFAULT_MODULE_ID].unwrapped(),
            reference=reference,
            average=self._average,
        )
        self._learner_connector.append(connector)

    @property
    def settings(self) -> LearnerSettings:
        """What the run's driver says."""
        found: LearnerSettings = self.config.learner_config_dict[KEY]
        return found

    def configure_optimizers_for_module(self, module_id: str, config: AlgorithmConfig | None = None) -> None:
        """Adam for the policy (RLlib's default) and one of its own, with its own clipping, for the critic."""
        super().configure_optimizers_for_module(module_id, config)
        module: PolicyModule = self._module[module_id].unwrapped()
        if module.critic is not None:
            parameters = list(module.critic.parameters())
            rate = self.settings.improve.value_learning_rate
            self.register_optimizer(
                module_id=module_id,
                optimizer_name="critic",
                optimizer=torch.optim.Adam(parameters, lr=rate),
                params=parameters,
                lr_or_lr_schedule=rate,
            )

    def _base(self) -> BaseLM:
        own, module = self.settings, self.settings.module
        path = base_path(module["checkpoint"]) if module["level"] == "latent" else module["checkpoint"]
        lm = load_base(path, dtype=own.dtype, trust_remote_code=module["trust_remote_code"])
        base = BaseLM(lm, own.late_blocks if own.reads in ("late", "both") else 0)
        if own.reads == "late":
            base.drop_late_blocks()
        return self._placed(base)

    def _placed(self, frozen: Frozen) -> Frozen:
        return frozen.to(self._device)

    def _microbatches(self, lengths: torch.Tensor) -> list[torch.Tensor]:
        return microbatches(lengths, self.improve.microbatch_tokens)

    def get_parameters(self, module: Any) -> Sequence[torch.nn.Parameter]:
        """What is trained of the policy; RLlib's default hands frozen tensors to the optimiser too."""
        return [p for p in module.unwrapped().policy.parameters() if p.requires_grad]

    def set_state(self, state: dict[str, Any]) -> None:
        """Take ``state`` as it is: RLlib would ignore weights older than its own, and keep a count of 0."""
        if WEIGHTS_SEQ_NO in state:
            self._weights_seq_no = 0
        super().set_state(state)

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """RLlib shuffles epochs with numpy's global stream: make it depend on seed and update alone, so that resume
        shuffles alike."""
        super().before_gradient_based_update(timesteps=timesteps)
        self._steps_taken, self._broken, self._far = 0, 0.0, False
        np.random.seed(rollout_seed(self.config.seed or 0, self._weights_seq_no) % 2**32)

    def compute_loss_for_module(
        self, *, module_id: str, config: AlgorithmConfig, batch: Batch, fwd_out: dict[str, Any]
    ) -> torch.Tensor:
        """The clipped surrogate of one microbatch, as its share of the minibatch's mean, and the critic's loss where
        there is one."""
        mask, sampling = batch[Columns.LOSS_MASK], self.settings.sampling
        logits = fwd_out[Columns.ACTION_DIST_INPUTS]
        reference = self._reference_log_probs(batch)
        whole = reference is not None or "start_log_probs" in batch
        full = action_log_probs(logits, temperature=sampling["temperature"]) if whole else None
        loss, metrics = surrogate_loss(self.improve, sampling, batch, logits, reference=reference, full=full)
        loss = loss * self._scale
        if "start_log_probs" in batch and full is not None:
            kl = kl_divergence(batch["start_log_probs"][mask], full.detach())
            metrics["kl_to_start"] = batch["weights"][mask] @ kl
        if "penalty_kl" in batch:
            metrics["kl_to_reference"] = (batch["weights"] * batch["penalty_kl"])[mask].sum()
        if Columns.VF_PREDS in fwd_out:
            critic_loss, critic_metrics = value_loss(
                fwd_out[Columns.VF_PREDS], batch["returns"][mask], batch["weights"][mask]
            )
            loss, metrics = loss + critic_loss, metrics | critic_metrics
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        return loss

    def _reference_log_probs(self, batch: Batch) -> torch.Tensor | None:
        """[M, N] at a microbatch's loss positions; of a whole batch at token level it would be B x T x V numbers."""
        if self.reference is None:
            return None
        with torch.no_grad():
            logits = self.reference.logits_at(batch["features"], batch[Columns.LOSS_MASK])
            return action_log_probs(logits, temperature=self.settings.sampling["temperature"])

    def _update(self, batch: dict[str, Any], **_: Any) -> tuple[Any, Any, Any]:
        """One optimiser step on a minibatch, its gradient accumulated over microbatches of similar length.

        A step whose gradient is not finite is not taken, nor are those after it in this update; nor any of an update
        whose log-probabilities are not this policy's, or not found again in what was written (``max_logp_mismatch``);
        nor one once the policy is beyond ``target_kl`` from where it began. Metric ``update_broken``: its ``Fault``.
        """
        if self._far:
            return {}, {DEFAULT_MODULE_ID: torch.zeros(())}, {}
        columns: Batch = dict(batch[DEFAULT_MODULE_ID])
        mask = columns[Columns.LOSS_MASK]
        columns["weights"] = position_weights(mask, self.improve.loss_mean, self._average)
        constant = self.improve.loss_mean == "constant"
        self._scale = constant_scale(mask, self.settings.longest, self._average) if constant else 1.0
        self._sums = {"rescored_gap": float(columns.pop("rescored_gap")[0])}
        self._mismatch_bound = mismatch_bound(
            columns["features"].dtype, torch.bfloat16 if self._in_bf16 else torch.float32
        )
        for optimizer in self._optimizer_parameters:
            optimizer.zero_grad(set_to_none=True)
        module, loss_sum = self.module[DEFAULT_MODULE_ID], torch.zeros((), device=self._device)
        chunks = self._microbatches(columns["lengths"])
        for number, rows in enumerate(chunks):
            longest = int(columns["lengths"][rows].max())
            part = {name: c[rows][:, :longest] if c.ndim > 1 else c[rows] for name, c in columns.items()}
            last = number == len(chunks) - 1
            with contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync():
                loss_sum += self._backward(part)
        gradients = {ref: p.grad for ref, p in self._params.items() if p.grad is not None}
        self._broken = self._broken or float(self._fault(gradients))
        self._far = not self._broken and self._beyond_target()
        if not self._broken and not self._far:
            self._set_learning_rate()
            self.apply_gradients(self.postprocess_gradients(gradients))
            self._steps_taken += 1
        self._sums |= {"policy_loss": loss_sum, "update_broken": self._broken, "steps_taken": float(self._steps_taken)}
        self.metrics.log_dict(self._sums, key=DEFAULT_MODULE_ID, window=1)
        return {}, {DEFAULT_MODULE_ID: loss_sum}, {}

    def _backward(self, part: Batch) -> torch.Tensor:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._in_bf16):
            output = self.module.forward_train({DEFAULT_MODULE_ID: part})
        loss = self.compute_losses(fwd_out=output, batch={DEFAULT_MODULE_ID: part})[DEFAULT_MODULE_ID]
        loss.backward()
        return loss.detach()

    @property
    def _in_bf16(self) -> bool:
        return self.improve.mixed_precision == "bf16"

    def _average(self, count: torch.Tensor) -> torch.Tensor:
        if self.config.num_learners > 1:
            torch.distributed.all_reduce(count)
            count = count / self.config.num_learners
        return count

    def _fault(self, gradients: dict[Any, torch.Tensor]) -> Fault:
        """Why a step must not be taken; the same on every learner, or some would wait for ever."""
        # After the all-reduce every learner holds the same gradient.
        if not torch.isfinite(whole(torch.nn.utils.get_total_norm(list(gradients.values())))):
            return Fault.NOT_FINITE
        bound = self.improve.max_logp_mismatch or self._mismatch_bound
        if not self._sums["rescored_gap"] <= bound:
            return Fault.NOT_FOUND_AGAIN
        # Before its first step the learner holds the policy that sampled; under async rules it may be a newer one.
        if self.improve.mode == "async" or self._steps_taken:
            return Fault.NONE
        gap = self._average(torch.as_tensor(self._sums["logp_gap"], device=self._device).clone())
        return Fault.NONE if gap <= bound else Fault.LEARNER_DIFFERS

    def _beyond_target(self) -> bool:
        """Whether earlier steps of this update led farther than ``target_kl``; the same on every learner."""
        moved = self._average(torch.as_tensor(self._sums.get("kl_to_start", 0.0)).clone())
        return bool(moved > (self.improve.target_kl or math.inf))

    def _set_learning_rate(self) -> None:
        share = learning_rate_share(self.improve, self._weights_seq_no - 1)
        for name, optimizer in self._named_optimizers.items():
            rate = self.improve.value_learning_rate if name.endswith("_critic") else self.config.lr
            for group in optimizer.param_groups:
                group["lr"] = rate * share
