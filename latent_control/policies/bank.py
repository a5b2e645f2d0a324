"""Many ``mlp`` policies of one shape in one batch: each row reads the weights of its own member.

Weights are stacked [K, ...], a slot for each member. Rows are sorted by slot; where neighbouring slots have equally
many rows, one batched product on a view of the stack serves them all, so that no weight is ever copied (on a CPU
copying costs more than the product).
Axes: K slots, R rows, P pairs of row and member, D width of the base, N codes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from latent_control.policies.mlp import MlpPolicy

MOST_MIXED, LARGEST_WEIGHT = 16, 16.0
"""Members of one mix, and the weight of one of them."""
GROWTH = 8
"""A full stack grows by an eighth: at most this much of it lies idle."""


class BankMember:
    """A policy of a bank. Its slot is its own for as long as anybody holds this object: rows under way keep a member
    that was removed."""

    __slots__ = ("__weakref__", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot


Blend: TypeAlias = tuple[tuple[BankMember, float], ...]
"""Members and their weights w: the policy proportional to prod_i pi_i^w_i (a product of experts). One member with
weight 1 is that member."""


class SlotRun(NamedTuple):
    """Neighbouring slots with equally many rows each, which follow each other: ``SlotRun(slot=3, slots=2, rows=4)``."""

    slot: int
    slots: int
    rows: int


class Plan(NamedTuple):
    """How pairs are sorted by slot."""

    order: torch.Tensor
    """[P], the pairs in the order of their slots"""
    back: torch.Tensor
    """[P], its inverse"""
    slots: torch.Tensor
    """[P], sorted"""
    runs: tuple[SlotRun, ...]


@lru_cache(maxsize=256)
def plan(slots: tuple[int, ...], device: torch.device) -> Plan:
    """The plan of pairs in ``slots``."""
    order = sorted(range(len(slots)), key=slots.__getitem__)
    groups = [(slot, len(list(group))) for slot, group in groupby(slots[pair] for pair in order)]
    # Within a run, slot minus place is constant, and so is the number of rows.
    together = groupby(enumerate(groups), key=lambda item: (item[1][0] - item[0], item[1][1]))
    runs = tuple(
        SlotRun(first[1][0], 1 + len(list(rest)), first[1][1]) for _, rest in together for first in [next(rest)]
    )
    places = torch.tensor(order, device=device)
    return Plan(places, places.argsort(), torch.tensor(sorted(slots), device=device), runs)


class _Batch:
    """The rows that the layers below compute now."""

    plan: Plan


class _StackedNorm(nn.Module):
    def __init__(self, like: nn.LayerNorm, batch: _Batch) -> None:
        super().__init__()
        self.shape, self.eps, self.batch = like.normalized_shape, like.eps, batch
        for name, tensor in like.named_parameters():
            self.register_buffer(name, tensor.detach().new_empty(0, *tensor.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.batch.plan
        if len(rows.runs) == rows.runs[0].slots == 1:
            slot = rows.runs[0].slot
            return F.layer_norm(x, self.shape, self.weight[slot], self.bias[slot], self.eps)
        return torch.addcmul(self.bias[rows.slots], F.layer_norm(x, self.shape, eps=self.eps), self.weight[rows.slots])


class _StackedLinear(nn.Module):
    """Weights [K, in, out]: the other way round than ``nn.Linear``, as batched products of single rows are fastest."""

    def __init__(self, like: nn.Linear, batch: _Batch) -> None:
        super().__init__()
        self.batch, weight = batch, like.weight.detach()
        self.register_buffer("weight", weight.new_empty(0, *weight.T.shape))
        self.register_buffer("bias", None if like.bias is None else weight.new_empty(0, len(weight)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, start = self.batch.plan, 0
        out = x.new_zeros(len(x), self.weight.shape[2]) if self.bias is None else self.bias[rows.slots]
        for slot, slots, each in rows.runs:
            end = start + slots * each
            if slots == 1:
                out[start:end].addmm_(x[start:end], self.weight[slot])
            else:
                parts = [part[start:end].view(slots, each, -1) for part in (out, x)]
                parts[0].baddbmm_(parts[1], self.weight[slot : slot + slots])
            start = end
        return out


class PolicyBank:
    """Named ``mlp`` policies of the shape of ``like``.

    ``bank.logits(states, [bank.blend("formal"), bank.blend({"concise": 0.7, "formal": 0.3})])``
    """

    def __init__(self, like: MlpPolicy) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in like.state_dict().items()}
        self.members: dict[str, BankMember] = {}
        self.free: list[int] = []
        self.batch = _Batch()
        self.network = copy.deepcopy(like)  # its forward pass, over stacked layers
        for path, module in like.named_modules():
            if isinstance(module, nn.LayerNorm | nn.Linear):
                stacked = _StackedNorm if isinstance(module, nn.LayerNorm) else _StackedLinear
                self.network.set_submodule(path, stacked(module, self.batch))  # type: ignore[arg-type]

    @property
    def capacity(self) -> int:
        """Slots, used or not."""
        return len(self.network.get_buffer("head.weight"))

    def put(self, name: str, weights: Mapping[str, torch.Tensor]) -> BankMember:
        """Add a member, or replace the weights of the one that has this name; no other member is touched.

        Raises:
            ValueError: the weights are not those of the bank's shape.
        """
        found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        if found != self.shapes:
            wrong = sorted(key for key in found.keys() | self.shapes.keys() if found.get(key) != self.shapes.get(key))
            raise ValueError(
                f"the policy {name!r} is not of the bank's shape: {wrong[0]} is {found.get(wrong[0], 'missing')}, "
                f"not {self.shapes.get(wrong[0], 'there')}; a bank's members share width and layers"
            )
        member = self.members.get(name) or self._new_member()
        for key, buffer in self.network.named_buffers():
            tensor = weights[key]
            buffer[member.slot].copy_(tensor.T if buffer.ndim == 3 else tensor)
        self.members[name] = member
        return member

    def remove(self, name: str) -> None:
        """Forget a member; its slot is free when no row under way holds it."""
        del self.members[name]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a member, as ``MlpPolicy.state_dict`` has them; copies."""
        slot = self.members[name].slot
        buffers = {key: buffer[slot] for key, buffer in self.network.named_buffers()}
        return {key: (tensor.T if tensor.ndim == 2 else tensor).clone() for key, tensor in buffers.items()}

    def blend(self, asked: str | Mapping[str, float]) -> Blend:
        """``blend`` of the bank's members."""
        return blend(self.members, asked)

    def logits(self, states: torch.Tensor, blends: Sequence[Blend]) -> torch.Tensor:
        """Logits [R, N] of states [R, D], of each row by its own blend; of a mix, sum_i w_i log pi_i, renormalised."""
        pairs = [(row, member.slot, weight) for row, blend in enumerate(blends) for member, weight in blend]
        rows, slots, weights = zip(*pairs, strict=True)
        mixed = any(weight != 1 for weight in weights) or len(pairs) > len(blends)
        with torch.no_grad():
            if not mixed:
                return self._pairs(states, slots)
            index = torch.tensor(rows, device=states.device)
            log_probs = self._pairs(states[index], slots).float().log_softmax(-1)
            shares = log_probs * torch.tensor(weights, device=states.device)[:, None]
            return torch.zeros_like(log_probs[: len(blends)]).index_add_(0, index, shares).log_softmax(-1)

    def _pairs(self, states: torch.Tensor, slots: tuple[int, ...]) -> torch.Tensor:
        """Logits [P, N] of states [P, D] by the members in ``slots``."""
        self.batch.plan = rows = plan(slots, states.device)
        logits: torch.Tensor = self.network(states[rows.order])
        return logits[rows.back]

    def _new_member(self) -> BankMember:
        if not self.free:
            self._grow()
        slot = min(self.free)  # low ones first: used slots lie together
        self.free.remove(slot)
        member = BankMember(slot)
        # Not at exit, when nobody needs a slot.
        weakref.finalize(member, self.free.append, slot).atexit = False
        return member

    def _grow(self) -> None:
        old = self.capacity
        new = old + max(1, old // GROWTH)
        for module in self.network.modules():
            for key, buffer in module.named_buffers(recurse=False):
                grown = buffer.new_empty(new, *buffer.shape[1:])
                grown[:old] = buffer
                setattr(module, key, grown)
        self.free += range(old, new)


def blend(members: Mapping[str, BankMember], asked: str | Mapping[str, float]) -> Blend:
    """A member by name, or several with their weights.

    Raises:
        ValueError: there is no such member, there are too many or none, or a weight is not a number above 0.
    """
    weights = {asked: 1.0} if isinstance(asked, str) else asked
    if not 1 <= len(weights) <= MOST_MIXED:
        raise ValueError(f"{len(weights)} policies are mixed: give 1 to {MOST_MIXED}")
    if unknown := [name for name in weights if name not in members]:
        raise ValueError(f"there is no policy {unknown[0]!r:.80}; there are {', '.join([*members][:20])}")
    if wrong := [name for name, weight in weights.items() if not _is_weight(weight)]:
        raise ValueError(
            f"the weight of {wrong[0]!r:.80} is {weights[wrong[0]]!r:.40}: give a number above 0 and up to "
            f"{LARGEST_WEIGHT:g}"
        )
    return tuple((members[name], float(weight)) for name, weight in weights.items())


def _is_weight(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight <= LARGEST_WEIGHT
