"""Which prompts an update trains on, and how they are cut into requests."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.utils.minibatch_utils import ShardObjectRefIterator

from pipeline.rl import prompt_order
from pipeline.rl.prompt_order import chunk_count, chunks, prompt_indices


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 60), count=st.integers(1, 60), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_each_prompt_at_most_once_per_pass_and_few_left_over(size: int, count: int, seed: int, epoch: int) -> None:
    if count > size:
        with pytest.raises(ValueError, match=f"prompts_per_update is {count}.*only {size} training prompts"):
            prompt_indices(0, count, size=size, seed=seed)
        return
    updates = size // count
    seen = Counter(i for u in range(updates) for i in prompt_indices(epoch * updates + u, count, size=size, seed=seed))
    assert set(seen.values()) == {1} and set(seen) <= set(range(size))
    assert size - len(seen) < count


def test_a_pass_over_a_divisible_set_plays_every_prompt_once() -> None:
    played = sorted(i for update in range(5) for i in prompt_indices(update, 4, size=20, seed=0))
    assert played == list(range(20))


def test_every_pass_has_a_new_order_and_every_seed_its_own() -> None:
    orders = {tuple(prompt_indices(epoch, 20, size=20, seed=seed)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_left_over_prompts_come_in_other_passes() -> None:
    played = {i for update in range(20) for i in prompt_indices(update, 4, size=7, seed=0)}
    assert played == set(range(7))


def test_no_update_holds_a_prompt_twice() -> None:
    """Seed and prompt name a rollout: the same prompt twice in an update would give the same rollouts twice."""
    for update in range(50):
        assert len(set(prompt_indices(update, 6, size=8, seed=1))) == 6


def test_an_update_knows_its_prompts_without_the_ones_before() -> None:
    straight = [prompt_indices(update, 3, size=10, seed=4) for update in range(12)]
    prompt_order._permutation.cache_clear()
    assert [prompt_indices(update, 3, size=10, seed=4) for update in reversed(range(12))] == straight[::-1]


def test_huge_generated_sets_are_taken_in_order() -> None:
    size = prompt_order.LARGEST_PERMUTED + 1
    assert prompt_indices(2, 3, size=size, seed=0) == (6, 7, 8)
    assert all(i < size for i in prompt_indices(size // 3, 3, size=size, seed=0))


@given(items=st.lists(st.integers(), max_size=40), parts=st.integers(1, 50))
def test_chunks_keep_order_and_are_nearly_equal(items: list[int], parts: int) -> None:
    found = chunks(items, parts) if items else []
    assert [i for chunk in found for i in chunk] == items
    assert len(found) == min(parts, len(items))
    assert all(found) and (not found or max(map(len, found)) - min(map(len, found)) <= 1)


@given(learners=st.integers(0, 5), share=st.integers(1, 12), workers=st.integers(1, 20))
def test_requests_keep_every_worker_busy_and_divide_over_the_learners(learners: int, share: int, workers: int) -> None:
    prompts = share * max(1, learners)  # the config's check asks for a multiple
    count = chunk_count(prompts, workers, learners)
    assert 1 <= count <= prompts
    assert count % max(1, learners) == 0
    assert count >= min(workers, prompts // max(1, learners) * max(1, learners))
    # RLlib deals whole requests to the learners; each must get the same number of prompts, or rows are repeated or
    # lost.
    dealt = ShardObjectRefIterator(chunks(range(prompts), count), max(1, learners))
    assert {sum(map(len, shard)) for shard in dealt} == {share}
