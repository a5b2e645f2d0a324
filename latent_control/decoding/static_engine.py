"""Decoding on tensors that never move: memory of a fixed size, every slot computed in every step, the step a CUDA graph
on a GPU.

A step of the ordinary engine is hundreds of small kernels, which a GPU finishes faster than Python can start them. Here
a step reads and writes the same tensors every time, so that CUDA can record it once and replay it whole. Finished and
empty slots are computed along and ignored. On a CPU the same step runs without a graph, which is how the tests compare
it with the ordinary engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from latent_control.decoding.engine import Engine
from latent_control.decoding.slot_memory import SlotLayer, SlotMemory
from latent_control.records import read_state

# Columns beyond the longest row: the number of steps between two moves of everything to the left.
ROOM = 64

Outputs = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
"""Final states [S, D], the states the policy read [S, D], logits [S, actions] of all slots."""


class StaticLayer(SlotLayer):
    """Writes where ``memory.column`` says, a tensor, and returns all columns there are."""

    memory: StaticMemory

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one new position per slot [S, H, 1, d]; return [S, H, capacity, d]."""
        self.key_buffer.data.index_copy_(2, self.memory.column, key_states)
        self.value_buffer.data.index_copy_(2, self.memory.column, value_states)
        return self.key_buffer.data, self.value_buffer.data


class StaticMemory(SlotMemory):
    """A memory whose buffers keep their size and place; what is in use moves to the left when the end is reached."""

    def __init__(self, slots: int, prompt: int, response: int, device: torch.device) -> None:
        super().__init__(slots, prompt)
        self.rows, self.capacity = slots, prompt + response + ROOM
        self.column = torch.zeros(1, dtype=torch.long, device=device)

    def new_layer(self, keys: torch.Tensor, values: torch.Tensor) -> StaticLayer:
        """A layer that stays where it is."""
        return StaticLayer(self, keys, values)

    def reserve(self, before: int, after: int) -> None:
        """As in ``SlotMemory``, within the capacity."""
        if self.end >= before and self.end + after <= self.capacity:
            return
        used = self.end - self.start
        end = max(before, used)
        assert end + after <= self.capacity, "no row is longer than the memory was made for"
        for buffer in self.buffers:
            kept = buffer.data[..., self.start : self.end, :].clone()
            buffer.data.zero_()
            buffer.data[..., end - used : end, :] = kept
        self.start, self.end = end - used, end


class StaticEngine(Engine):
    """``Engine`` for Llama-shaped bases on fixed tensors."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.lean_base is None or (self.actor.stack is not None and self.lean_stack is None):
            found = type(self.base.decoder).__name__
            raise ValueError(
                f"static caches need Llama-shaped blocks; {found} has others: set rollout.static_cache: false"
            )
        self.memory = StaticMemory(
            self.slots, max(map(len, self.prompts.prompts.values())), self.longest, self.position.device
        )
        self.graph = Graph(self._compute)

    def _compute(self) -> Outputs:
        """One position of every slot."""
        assert self.lean_base is not None and self.base_cache is not None
        x = self.base.decoder.get_input_embeddings()(self.next_tokens)
        self.place = self.lean_base.place(self.position, self.seen.data[..., 0], x)
        final, late = self.lean_base.step(x, self.place, self.base_cache, self.base.late_blocks)
        state = read_state(self.actor.reads, final, late)
        assert state is not None, f"the base supplies no {self.actor.reads!r} state"
        hidden = state if self.actor.stack is None else self._stack_step(self.actor.stack, state)
        return final, state, self.actor.head(hidden)

    def _advance(self, live: list[int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        memory = self.memory
        assert isinstance(memory, StaticMemory)
        if memory.end == memory.capacity:
            memory.start = memory.end - max(self._filled(row) for row in self.rows_in if row is not None)
            memory.reserve(before=0, after=1)
        memory.column.fill_(memory.end)
        self.seen.data[:, memory.end] = True  # of empty slots too: what sees nothing becomes NaN
        final, state, logits = self.graph()
        if self.states is not None:
            self.states.data[:, memory.end] = state
        self.position[live] += 1
        memory.end += 1
        if self.params.members is not None:  # which rows there are is no part of the graph
            logits[live] = self._logits([self.rows_in[slot] for slot in live], state[live])
        return None if final is None else final[live], logits[live]

    def _squeeze(self) -> None:
        """Gaps stay."""


class Graph:
    """A function of tensors that stay where they are: recorded at its first call on a GPU and replayed from then on."""

    def __init__(self, function: Callable[[], Outputs]) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Outputs | None = None

    def __call__(self) -> Outputs:
        """Its outputs; on a GPU always the same tensors, overwritten by the next call."""
        if self.graph is not None and self.outputs is not None:
            self.graph.replay()
            return self.outputs
        outputs = self.function()
        if outputs[1].is_cuda:  # that call has warmed up libraries, and writes the same again
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function()
        return outputs
