"""``improve.shard``: policy, critic, optimiser state, reference policy and base LM are split over the learner actors
(FSDP2) instead of copied to each.

FSDP2 gathers a block's tensors when the block is called, and averages its gradient over the learners as DDP would, so
that steps are the same. All learners must therefore call their modules equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from ray.rllib.core import COMPONENT_LEARNER, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.numpy import convert_to_numpy
from torch.distributed.device_mesh import init_device_mesh

from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import DecoderStack
from latent_control.token_policy import WholeModel
from learners.learner import Frozen, PolicyLearner, microbatches
from learners.rl_module import PolicyModule
from learners.sharding import like, shard_root, whole


def split_to(chunks: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """At least ``count`` chunks of row numbers, the largest ones cut in two."""
    chunks = list(chunks)
    while len(chunks) < count:
        largest = max(range(len(chunks)), key=lambda number: len(chunks[number]))
        assert len(chunks[largest]) > 1, f"{count} chunks of fewer rows"
        chunks[largest : largest + 1] = chunks[largest].tensor_split(2)
    return chunks


def clip_by_global_norm(
    gradients: dict[Any, torch.Tensor], *, grad_clip: float, grad_clip_by: str = "global_norm"
) -> torch.Tensor:
    """Scale ``gradients`` down, in place, to a norm of at most ``grad_clip`` over the tensors' parts on all learners;
    the norm before that."""
    assert grad_clip_by == "global_norm"
    norm = whole(torch.nn.utils.get_total_norm(list(gradients.values())))
    torch.nn.utils.clip_grads_with_norm_(list(gradients), grad_clip, norm)
    return norm


class ShardedLearner(PolicyLearner):
    """One of the learners that a policy is split over."""

    def _map_module_to_device(self, module: Any) -> None:
        """Split the module, which also moves it to the device: RLlib makes the optimisers next."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self.mesh = init_device_mesh(self._device.type, (self.config.num_learners,))
        policy: PolicyModule = module[DEFAULT_MODULE_ID].unwrapped()
        self._placed(policy.policy)
        if policy.critic is not None:
            shard_root(policy.critic, self.mesh, "forward")

    def _make_modules_ddp_if_necessary(self) -> None:
        """FSDP2 does what RLlib uses DDP for."""

    def _placed(self, frozen: Frozen) -> Frozen:
        if isinstance(frozen, BaseLM):
            shard_root(frozen, self.mesh, "features", frozen.decoder)
        elif isinstance(frozen, WholeModel):
            shard_root(frozen, self.mesh, "logits_at", frozen.base.decoder)
        else:
            blocks = frozen.decoder if isinstance(frozen, DecoderStack) else None
            shard_root(frozen, self.mesh, "logits_at", blocks)
        return frozen

    def _microbatches(self, lengths: torch.Tensor) -> list[torch.Tensor]:
        """As many as the learner with the most of them has; all have the same number of rows."""
        chunks = microbatches(lengths, self.improve.microbatch_tokens)
        most = torch.tensor(len(chunks), device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return split_to(chunks, int(most))

    @staticmethod
    def _get_clip_function() -> Callable[..., torch.Tensor]:
        return clip_by_global_norm

    def apply_gradients(self, gradients_dict: dict[Any, torch.Tensor]) -> None:
        """A step of each optimiser; that all gradients are finite is known."""
        for optimizer in self._optimizer_parameters:
            optimizer.step()

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The whole state on the first learner, nothing on the others; all must be asked at once."""
        state: dict[str, Any] = super().get_state(*args, **kwargs)
        return state if dist.get_rank() == 0 else {}

    def _get_optimizer_state(self) -> dict[str, Any]:
        """As RLlib's, of whole tensors: any number of learners can go on from it."""
        found: dict[str, Any] = {}
        for name, optimizer in self._named_optimizers.items():
            saved = optimizer.state_dict()
            saved["state"] = {
                number: {key: _whole_array(value) for key, value in moments.items()}
                for number, moments in saved["state"].items()
            }
            found[name] = {"module_id": self._optimizer_name_to_module[name], "state": saved}
        return found

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            optimizer = self._named_optimizers[name]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            split = {
                number: {key: _part(parameters[int(number)], value) for key, value in moments.items()}
                for number, moments in saved["state"]["state"].items()
            }
            optimizer.load_state_dict({**saved["state"], "state": split})


def _whole_array(value: torch.Tensor) -> Any:
    full = whole(value)
    return convert_to_numpy(full) if dist.get_rank() == 0 else None


def _part(parameter: torch.Tensor, value: Any) -> torch.Tensor:
    """This learner's part of what an optimiser keeps of a parameter; its count of steps is everybody's."""
    tensor = torch.as_tensor(value)
    return like(parameter, tensor) if tensor.shape == parameter.shape else tensor


class ShardedLearnerGroup(LearnerGroup):
    """RLlib would ask one learner for its state, which would wait for the others' parts for ever."""

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """RLlib's, asked of all learners."""
        wanted = self._get_subcomponents(COMPONENT_LEARNER, components)
        unwanted = self._get_subcomponents(COMPONENT_LEARNER, not_components)
        results = self.foreach_learner(lambda learner: learner.get_state(wanted, not_components=unwanted, **kwargs))
        return {COMPONENT_LEARNER: next(state for state in self._get_results(results) if state)}
