"""The explorer's counts and its attribution of the gain, on numbers that can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from latent_control.decoding.rescoring import choices
from pipeline.evaluation.outcome_file import write_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.evaluation.statistics import paired_difference
from pipeline.pages.explorer import collapse, counts, gain
from pipeline.pages.explorer.build import beside
from pipeline.pages.explorer.corpus import Corpus, corpus_of
from pipeline.pages.explorer.reading import Effects, Read
from pipeline.pages.explorer.records import Code, Dataset, IntervalEstimate, Summary, UsageOverTraining
from pipeline.pages.records import as_data


def row(
    number: int, group: str, version: int, codes: list[int], tokens: list[int], reward: float, **changed: Any
) -> dict[str, Any]:
    return {
        "rollout_id": f"r{number}",
        "group_id": group,
        "prompt_id": "countdown/train/0",
        "prompt_text": "p",
        "prompt_tokens": np.array([7, 8]),
        "tokens": np.array(tokens),
        "generated": np.array([]),
        "turn_rewards": np.array([]),
        "actions": np.array(codes),
        "action_logp": np.log(np.full(len(tokens), 0.5)),
        "reward": reward,
        "success": reward == 1.0,
        "policy_version": version,
        "world_hash": "w",
        "level": "latent",
    } | changed


def corpus(rows: list[dict[str, Any]], num_actions: int = 4, span: int = 1) -> Corpus:
    return corpus_of(rows, num_actions=num_actions, span=span)


TWO_GROUPS = [
    row(0, "a", 0, [0, 1], [10, 11], 1.0),
    row(1, "a", 0, [0, 2], [10, 12], 0.0),
    row(2, "b", 3, [0, 1], [10, 11], 1.0),
    row(3, "b", 3, [3, 1], [13, 11], 0.0),
]


class TestCorpus:
    def test_tokens_lie_flat_with_their_rollout_position_and_group(self):
        found = corpus(TWO_GROUPS)
        assert found.offsets.tolist() == [0, 2, 4, 6, 8]
        assert found.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert found.positions.tolist() == [0, 1] * 4
        assert found.groups.tolist() == [0, 0, 1, 1]
        assert found.advantages.tolist() == [0.5, -0.5, 0.5, -0.5]

    def test_inside_a_span_nothing_is_chosen(self):
        found = corpus([row(0, "a", 0, [1, 1, 2], [5, 6, 7], 1.0), row(1, "a", 0, [3], [5], 0.0)], span=2)
        assert found.choices.tolist() == [0, 2, 3]

    @pytest.mark.parametrize("span", [1, 2, 3])
    def test_choices_of_episodes_are_those_that_are_trained_on(self, span):
        marks = [[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1], [1, 0, 0, 1, 1], []]
        lengths = [11, 5, 4]
        rows = [
            row(i, "a", 0, [0] * n, list(range(n)), 1.0, generated=np.array(own))
            for i, (own, n) in enumerate(zip(marks, lengths, strict=True))
        ]
        found = corpus(rows, span=span)
        wanted = np.concatenate([choices(np.array(own, bool), n, span) for own, n in zip(marks, lengths, strict=True)])
        assert found.choices.tolist() == np.flatnonzero(wanted).tolist()
        assert found.turns.tolist() == [0] * 5 + [1] * 5 + [2] + [0] * 3 + [1] * 2 + [0] * 4
        assert found.places[found.generated].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0, 1, 0, 1, 2, 3]
        assert found.subset(np.array([1, 2])).turns.tolist() == [0] * 3 + [1] * 2 + [0] * 4

    def test_n_grams_end_with_their_response(self):
        # Codes 1, 2 | 3, 1 | 2: the pairs inside of responses are (1, 2) and (3, 1).
        seen = {"generated": np.array([1, 1, 0, 1, 1, 0, 1])}
        rows = [row(i, "a", 0, [1, 2, 0, 3, 1, 0, 2], [5, 6, 9, 7, 5, 9, 6], float(i % 2), **seen) for i in range(10)]
        better, worse = counts.ngrams(corpus(rows))
        found = {gram[0]: gram[1] for side in (better, worse) for grams in side.values() for gram in grams}
        assert found.keys() <= {(1, 2), (3, 1)}
        assert counts._grams(corpus(rows), 2)[0][:2] == ((1, 2), (5, 6))
        assert len(counts._grams(corpus(rows), 3)) == 0

    def test_without_groups_rewards_are_compared_with_all(self):
        found = corpus([row(0, "a", 0, [1], [5], 1.0), row(1, "b", 0, [1], [5], 0.0)])
        assert found.advantages.tolist() == [0.5, -0.5]

    def test_whole_groups_are_taken_from_both_ends_of_training(self):
        many = corpus([row(2 * g + i, f"g{g:02}", g, [0], [1], float(i)) for g in range(10) for i in range(2)])
        rows = many.whole_groups(6, 1000)
        assert rows.tolist() == [0, 1, 8, 9, 18, 19]
        part = many.subset(rows)
        assert part.versions.tolist() == [0, 0, 4, 4, 9, 9]
        assert part.groups.tolist() == [0, 0, 1, 1, 2, 2]
        assert part.tokens.tolist() == [1] * 6

    def test_codes_of_two_codebooks_are_not_mixed(self):
        with pytest.raises(ValueError, match="2 codebooks"):
            corpus([TWO_GROUPS[0], row(9, "c", 1, [0], [1], 0.0, world_hash="other")])


class TestCounts:
    def test_health_of_four_codes(self):
        # A tenth of an even share of 1/4 is 0.025.
        assert counts.health(np.array([0.955, 0.025, 0.02, 0.0])) == ["active", "rare", "rare", "unused"]

    def test_entropy_of_a_code_that_writes_two_tokens_alike_is_log_two(self):
        found = counts.token_entropies(np.array([0, 0, 1, 1]), np.array([5, 9, 5, 5]), 3)
        assert found == pytest.approx([math.log(2), 0.0, 0.0])

    def test_shares_sum_to_one_by_key(self):
        table = counts.shares(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 3, 2)
        assert table.tolist() == [[2 / 3, 1 / 3], [0.0, 1.0], [0.0, 0.0]]

    def test_points_join_neighbouring_updates(self):
        place, names = counts.points(np.array([0, 0, 3, 4, 9]), most=2)
        assert place.tolist() == [0, 0, 0, 1, 1]
        assert names == ["1-4", "5-10"]

    def test_places_are_single_positions_where_there_are_few(self):
        assert counts.bins(np.array([0, 2]), most=3)[1] == ["0", "1", "2"]
        place, names = counts.bins(np.array([0, 5, 6]), most=4)
        assert place.tolist() == [0, 2, 3]
        assert names == ["0-1", "2-3", "4-5", "6-7"]

    def test_contexts_say_how_often_and_what_share_is_this_codes(self):
        rows = [row(i, "a", 0, [0, c], [10, 11], 0.0) for i, c in enumerate((1, 1, 2))]
        found = counts.contexts(corpus(rows))
        assert found[1] == [((7, 8, 10), 11, 2, 2 / 3, 0)]
        assert found[2] == [((7, 8, 10), 11, 1, 1 / 3, 2)]
        # At the beginning the prompt's two tokens are all there is before.
        assert found[0] == [((7, 8), 10, 3, 1.0, 0)]

    def test_log_odds_by_hand(self):
        # 3 of 4 against 1 of 4: log(3.5/1.5) - log(1.5/3.5), and four cells with variances 1/3.5 + 1/1.5, twice.
        expected = 2 * math.log(3.5 / 1.5) / math.sqrt(2 * (1 / 3.5 + 1 / 1.5))
        assert counts.log_odds(np.array([3]), np.array([1]), 4, 4) == pytest.approx([expected])

    def test_ngrams_tell_better_from_worse_rollouts_of_a_group(self):
        good = [row(2 * g, f"g{g}", g, [0, 1], [10, 11], 1.0) for g in range(6)]
        bad = [row(2 * g + 1, f"g{g}", g, [0, 2], [10, 12], 0.0) for g in range(6)]
        better, worse = counts.ngrams(corpus(good + bad))
        (gram,) = better[1]
        assert gram[:4] == ((0, 1), (10, 11), 6, 0)
        assert worse[2][0][:4] == ((0, 2), (10, 12), 0, 6)
        assert gram[4] == pytest.approx(-worse[2][0][4])
        assert 1 not in worse and 2 not in better

    def test_rollouts_as_good_as_their_group_tell_nothing(self):
        better, worse = counts.ngrams(corpus([row(i, "a", 0, [0, 1], [10, 11], 0.1) for i in range(12)]))
        assert not better and not worse

    def test_ngrams_do_not_run_over_the_end_of_a_rollout(self):
        rows = [row(2 * g + i, f"g{g}", g, [i], [10], float(i)) for g in range(6) for i in range(2)]
        assert counts.ngrams(corpus(rows)) == ({}, {})

    def test_ngrams_of_spans_have_all_their_tokens(self):
        rows = [row(2 * g + i, f"g{g}", g, [i, i, 3], [10, 11, 12], float(i)) for g in range(6) for i in range(2)]
        better, _ = counts.ngrams(corpus(rows, span=2))
        assert better[1][0][:2] == ((1, 3), (10, 11, 12))

    def test_overlap_of_codes_by_what_they_write(self):
        ours, mine = np.array([0, 0, 1]), np.array([5, 6, 7])
        theirs, their = np.array([0, 1, 1]), np.array([7, 5, 9])
        assert counts.overlap(ours, mine, theirs, their, (2, 2)).tolist() == [[0.0, 0.5], [1.0, 0.0]]


class TestLabels:
    def test_what_tells_a_code_from_the_others(self):
        # Code 0 writes 4 at position 0, code 1 writes 5 after it, code 2 whatever there is; 120 rollouts.
        rows = [row(i, f"g{i}", 0, [0, 1, 2], [4, 5, 4 + i % 2], 1.0) for i in range(120)]
        found = counts.labels(corpus(rows))
        kinds = {
            k: {kind: (value, here, elsewhere) for kind, value, here, elsewhere, _ in some} for k, some in found.items()
        }
        assert kinds[0] == {"writes": (4, 1.0, 60 / 240), "position": (0, 1.0, 0.0), "after": (8, 1.0, 0.0)}
        assert kinds[1]["after"] == (4, 1.0, 0.0) and kinds[1]["position"] == (1, 1.0, 0.0)
        assert kinds[2] == {"position": (2, 1.0, 0.0), "after": (5, 1.0, 0.0)}  # its tokens are the others', too
        assert 3 not in found  # never chosen
        z = [z for *_, z in found[0]]
        assert z == sorted(z, reverse=True) and min(z) >= counts.LABEL_Z

    def test_a_few_choices_are_no_label(self):
        assert counts.labels(corpus([row(0, "g", 0, [0, 1], [4, 5], 1.0)])) == {}


class TestGain:
    def test_leave_one_out_compares_with_the_others(self):
        found = gain.leave_one_out(np.array([1.0, 0.0, 0.5, 1.0]), np.array([0, 0, 0, 1]))
        # The last is alone in its group: there is nothing to compare it with.
        assert found == pytest.approx([0.75, -0.75, 0.0, 0.0])

    def test_an_interval_by_hand(self):
        # Two groups of one rollout with sums 3 and 1: mean 2, standard error 1, t = 12.706 of one degree of freedom.
        found = gain.estimate(np.array([1.0, 2.0, 1.0]), np.array([0, 0, 1]), np.array([1, 1]))
        assert found.mean == 2.0
        assert found.high - found.mean == pytest.approx(12.7062, abs=1e-4)

    @pytest.mark.parametrize("share", [1.0, 0.05])
    def test_intervals_over_few_prompts_cover(self, share):
        """A machine that is slow plays one round: 8 prompts."""
        rng, covered, prompts, each = np.random.default_rng(0), 0, 8, 200
        groups = np.repeat(np.arange(prompts), each)
        for _ in range(400):
            parts = (rng.normal(0, 1, len(groups)) + rng.normal(0, 1, prompts)[groups]) * (
                rng.random(len(groups)) < share
            )
            found = gain.estimate(parts, groups, np.full(prompts, 16))
            covered += found.low <= 0 <= found.high
        assert covered / 400 >= 0.93

    def test_codes_and_splits_add_up_to_the_whole(self):
        parts, codes, keys = np.array([0.2, 0.4, -0.1]), np.array([0, 1, 1]), np.array([0, 0, 1])
        each = gain.by_code(codes, parts, np.zeros(3, int), np.array([2]), 3)
        assert [e.mean for e in each] == pytest.approx([0.1, 0.15, 0.0])
        table = gain.by_key(keys, codes, parts, (2, 2), rollouts=2)
        assert table == pytest.approx(np.array([[0.1, 0.2], [0.0, -0.05]]))

    def test_the_evaluations_gain_is_over_the_prompts_of_both(self, tmp_path):
        def outcome(variant: str, prompt: int, reward: float | None, mode: str = "sampled") -> Outcome:
            return Outcome(
                variant=variant, mode=mode, prompt_id=f"t/heldout/{prompt}", sample=0, success=reward == 1.0,
                reward=reward, reward_parts={}, response="", prompt="", new_tokens=1,
            )  # fmt: skip

        assert gain.evaluated(tmp_path, "cloned", "improved", 0) is None
        rows = [outcome("cloned", p, 0.0) for p in range(8)] + [outcome("improved", p, 0.5) for p in range(6)]
        rows += [outcome("improved", 7, None), outcome("improved", 0, 9.0, "greedy"), outcome("base", 0, 9.0)]
        write_outcomes(tmp_path / "evaluation.parquet", rows)
        found, prompts = gain.evaluated(tmp_path, "cloned", "improved", 0)
        assert (found.mean, prompts) == (0.5, 6)
        before, after = np.random.default_rng(0).integers(0, 2, (2, 60)).astype(float)
        rows = [outcome("cloned", p, r) for p, r in enumerate(before)]
        rows += [outcome("improved", p, r) for p, r in enumerate(after)]
        write_outcomes(tmp_path / "evaluation.parquet", rows)
        found, _ = gain.evaluated(tmp_path, "cloned", "improved", 3)
        assert vars(found) == paired_difference(after, before, 3)  # one number: as the evaluation has it
        assert gain.evaluated(tmp_path, "finetuned", "improved", 0) is None


class TestCollapse:
    def verdict(self, before, after, agree=0.0, changed=8.0, kl=4.0, counts=None):
        before, after = (np.array(p) for p in (before, after))
        n = before.shape[1]
        found = Read(
            rows=np.empty(0), choices=np.empty(0), before=before, after=after, states=np.empty(0), final=torch.empty(0)
        )
        agreement = torch.full((n, n), 100.0 * agree).fill_diagonal_(100.0)
        sums = Effects(
            own=torch.empty(0), mixture=torch.empty(0), anywhere=torch.empty(0), agree=agreement, states=100,
            kl=torch.full((n,), kl),
            counts=torch.full((n,), 8.0) if counts is None else torch.tensor(counts),
            changed=torch.full((n,), changed),
        )  # fmt: skip
        return collapse.collapse(found, sums, ["active"] * n)

    def test_entropies_by_hand(self):
        # Each state has its own two codes after RL: 2 are open in a state, 4 are in use altogether.
        found = self.verdict([[0.25] * 4] * 2, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
        assert found.marginal == pytest.approx((4.0, 4.0)) and found.state == pytest.approx((4.0, 2.0))
        assert (found.verdict, found.reasons, found.strength) == ("no collapse", (), 0.5)
        assert (found.active, found.acting, found.distinct) == (4, 4, 4)

    def test_clusters_by_hand(self):
        agreement = np.array([[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.1, 0.85], [0.1, 0.1, 1.0, 0.3], [0.2, 0.85, 0.3, 1.0]])
        # 3 agrees with 1, but 1 is in the cluster of 0, with which 3 does not agree.
        assert collapse.clusters([0, 1, 2, 3], agreement, 0.8) == [[0, 1], [2], [3]]
        assert collapse.clusters([3, 1, 0, 2], agreement, 0.8) == [[3, 1], [0], [2]]

    def test_each_kind_is_named(self):
        uniform, eight = [[0.25] * 4], [[0.125] * 8]
        one = self.verdict(eight, [[1.0] + [0.0] * 7])
        assert one.verdict == "collapse" and "uses 1.0 codes altogether, 8.0 before" in one.reasons[0]
        silent = self.verdict([[1, 0, 0, 0], [0, 1, 0, 0], *uniform], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
        assert silent.verdict == "no collapse, but no exploration is left"
        assert "move the next token by 0.001 nats" in self.verdict(uniform, uniform, kl=0.008).reasons[0]
        idle = self.verdict(uniform, uniform, changed=0.0)
        assert (idle.verdict, idle.acting, idle.probed) == ("no collapse", 0, 4)  # so they did before RL
        # Codes that the time budget left without a state are not counted.
        assert self.verdict(uniform, uniform, counts=[8.0, 0.0, 0.0, 0.0]).probed == 1
        assert self.verdict(uniform, uniform, agree=0.995).distinct == 1
        assert self.verdict(uniform, uniform, agree=0.98).distinct == 4


def test_records_become_plain_data():
    estimate = IntervalEstimate(mean=0.123456789, low=-1.0, high=2.0)
    code = Code(usage=0.5, uses=3, token_entropy=0.0, health="active", advantage=None, gain=estimate)
    found = as_data(code)
    assert found["gain"] == {"mean": 0.1235, "low": -1.0, "high": 2.0}
    assert found["shifts"] == [] and found["advantage"] is None


def test_runs_side_by_side_are_matched_by_text_not_by_token_id():
    def explored(tokens: list[int], texts: tuple[str, ...]) -> tuple[Dataset, Corpus, tuple[str, ...]]:
        some = corpus([row(0, "a", 0, [0, 1], tokens, 1.0)], num_actions=2)
        summary = Summary(
            run="r", num_actions=2, span=1, rollouts=1, stored=1, choices=2, perplexity=1.0, reward_first=0.0,
            reward_last=0.0, success_first=0.0, success_last=0.0, world="w",
        )  # fmt: skip
        training = UsageOverTraining(updates=(), usage=(), perplexity=(), reward=(), success=())
        return (
            Dataset(summary=summary, vocabulary=(), prompts=(), codes=(), training=training, splits=(), rollouts=()),
            some,
            texts,
        )

    a, b = beside(explored([4, 5], ("yes", "no")), explored([5, 4], ("no", "yes")))
    assert a.similar == ((1, 1.0), (0, 1.0))
    assert b.similar == ((1, 1.0), (0, 1.0))
