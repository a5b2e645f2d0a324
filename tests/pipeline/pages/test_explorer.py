"""The explorer on a small finished run: its numbers against slow ways of computing them, its page, its command."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from explorer_data import HOSTILE, made_up
from explorer_fixtures import SAID, UPDATES
from transformers import AutoTokenizer
from typer.testing import CliRunner

from configs.loading import dump_config, load_config
from configs.schema import DataSource, Explorer, ImproveOffline
from latent_control.analysis.explain import Walker, play_on, read_choices, token_log_probs
from latent_control.pretrained import WEIGHTS
from latent_control.records import TokenBatch
from pipeline.cli.main import app
from pipeline.cli.options import FAILED, USAGE
from pipeline.console.displays import automatic
from pipeline.pages.explorer import build, gain, path
from pipeline.pages.explorer.build import explore
from pipeline.pages.explorer.corpus import read_corpus
from pipeline.pages.explorer.page import SCRIPTS, page
from pipeline.pages.explorer.policies import load_models, policies_of
from pipeline.pages.explorer.reading import Clock, Models, Read, effects, read
from pipeline.pages.explorer.why import MOST_CHARACTERS, alternatives, prompt_of, to_explain
from pipeline.pages.explorer.write import write_at_end
from pipeline.pages.page import asset, embedded
from pipeline.runs.context import StageContext
from pipeline.runs.metrics_log import RunLog
from rollout_workers.tasks import Failure, Prompt, Score
from rollout_workers.tasks.countdown import Countdown

pytest_plugins = ["rl_fixtures", "explorer_fixtures"]
ENOUGH = Explorer(seconds=600.0, explained=3)


class WordsTask(Countdown):
    """Countdown's prompts; the reward is the share of words that are in ``words``."""

    def __init__(self, words: set[str]) -> None:
        super().__init__()
        self.wanted, self.texts = words, []

    def score(self, prompt, text):
        """Also keeps what it judged."""
        self.texts.append(text)
        words = text.split()
        return Score(reward=sum(word in self.wanted for word in words) / max(1, len(words)), success=False, parts={})


def heldout(number: int) -> list[Prompt]:
    prompts = Countdown().prompts("heldout")
    return [prompts[i] for i in range(number * path.PROMPTS, (number + 1) * path.PROMPTS)]


@pytest.fixture(scope="module")
def explored(explored_run):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(path, "ROUNDS", 1)
        return explore(explored_run, ENOUGH)


@pytest.fixture(scope="module")
def explored_episodes(episodes_run):
    return explore(episodes_run, ENOUGH)


@pytest.fixture(scope="module")
def loaded(explored_run):
    """(corpus, models) of the run."""
    config = load_config(explored_run / "config.yaml", [], check_paths=False)
    before, after = policies_of(explored_run)
    corpus, _, _ = read_corpus(explored_run, num_actions=8, span=1)
    return corpus, load_models(before, after, config, AutoTokenizer.from_pretrained(config.base.model))


@pytest.fixture
def copied(explored_run, tmp_path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(explored_run, tmp_path / "run"))


def section(run: Path, name: str, changes: dict[str, object] | None) -> None:
    """Change a section of the run's config, or take it out."""
    config = load_config(run / "config.yaml", [], check_paths=False)
    value = None if changes is None else getattr(config, name).model_copy(update=changes)
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={name: value})))


def offline(run: Path) -> None:
    section(run, "improve", None)
    config = load_config(run / "config.yaml", [], check_paths=False)
    source = DataSource(kind="replay", path=str(run))
    (run / "config.yaml").write_text(
        dump_config(config.model_copy(update={"improve_offline": ImproveOffline(data=(source,))}))
    )


class TestExplain:
    def test_choices_of_padded_rows_are_those_of_each_row_alone(self, model):
        rows, starts = [[5, 6, 7, 8, 9], [5, 6, 7]], [2, 1]
        ids, response = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool)
        for i, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(tokens)], response[i, start : len(tokens)] = torch.tensor(tokens), True
        batch = TokenBatch(input_ids=ids, attention_mask=(ids > 0).long(), response_mask=response)
        found = read_choices(model, (model.policy,), batch, temperature=0.5, top_k=None)
        alone = []
        for tokens, start in zip(rows, starts, strict=True):
            logits = model.policy_logits(model.features(torch.tensor([tokens])))[0]
            alone.append(torch.softmax(logits[start - 1 : len(tokens) - 1] / 0.5, -1))
        assert torch.allclose(found.policies[0], torch.cat(alone), atol=1e-6)

    @pytest.mark.parametrize("span", [1, 2])
    def test_the_policys_own_code_forced_ends_as_greedy_decoding_does(self, make_model, span):
        model = make_model(span=span)
        prompts = [[5, 6, 7], [9, 4]]
        for prompt in prompts:
            ids = torch.tensor([prompt])
            code = int(model.policy_logits(model.features(ids))[0, -1].argmax())
            greedy = model.generate(ids, max_new_tokens=5, temperature=0.0)
            (ending,) = play_on(model, [prompt], [code], [5])
            assert ending == greedy.tokens[0, : int(greedy.lengths[0])].tolist()

    def test_another_code_is_held_for_its_span_and_then_the_policy_goes_on(self, make_model):
        model = make_model(span=2)
        prompt, code = [5, 6, 7], 3
        wanted: list[int] = []
        for _ in range(2):
            final = model.features(torch.tensor([prompt + wanted])).read("final")[:, -1]
            wanted.append(int(model.world_logits_of_all(final)[0, code].argmax()))
        after = model.generate(torch.tensor([prompt + wanted]), max_new_tokens=2, temperature=0.0, stop_token=-1)
        found = play_on(model, [prompt, [9, 4]], [code, 1], [4, 1], stop_token=-1)
        assert found[0] == wanted + after.tokens[0].tolist()
        assert len(found[1]) == 1

    def test_token_log_probs_of_some_codes_are_those_among_all(self, model):
        final = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
        some = torch.tensor([[3, 1], [0, 7]])
        every = token_log_probs(model, final)
        assert torch.allclose(every.exp().sum(-1), torch.ones(2, 8), atol=1e-5)
        found = token_log_probs(model, final, some)
        assert torch.allclose(found, every.gather(1, some[..., None].expand(-1, -1, every.shape[-1])), atol=1e-5)


class TestPath:
    def test_the_ends_of_the_path_are_the_two_policies(self, loaded):
        models = loaded[1]
        walker = Walker(models.model, models.before, models.model.policy)
        for share, policy in ((0.0, models.before), (1.0, models.model.policy)):
            for own, theirs in zip(walker.at(share).parameters(), policy.parameters(), strict=True):
                assert torch.allclose(own, theirs)

    @pytest.mark.parametrize("span", [1, 2])
    def test_rises_are_differences_of_what_each_policy_gives_the_chosen_code(self, make_model, span):
        model, other = make_model(span=span), make_model(span=span, seed=2)
        rows, actions = [[5, 6, 7, 8], [9, 4, 3]], [[2, 2 if span == 2 else 5], [1]]
        places, found = Walker(model, other.policy, model.policy).rises(
            rows, actions, (0.0, 1.0), temperature=1.0, top_k=None
        )
        wanted = [(0, 0), (1, 0)] if span == 2 else [(0, 0), (0, 1), (1, 0)]
        assert [tuple(place) for place in places.tolist()] == wanted
        for (r, t), rise in zip(wanted, found, strict=True):
            end = len(rows[r]) - len(actions[r]) + t  # the code at t is chosen from what stands before its token
            states = model.features(torch.tensor([rows[r][:end]])).read("late")
            low, high = (
                torch.log_softmax(policy(states)[0, -1], -1)[actions[r][t]] for policy in (other.policy, model.policy)
            )
            assert rise == pytest.approx((high - low).item(), abs=1e-5)

    def test_the_parts_add_up_to_the_rise_between_the_two_policies(self, explored_run, loaded, monkeypatch):
        """The reward is the share of words that the last policy says more often; its rise is measured by playing both
        policies."""
        models, config = loaded[1], load_config(explored_run / "config.yaml", [], check_paths=False)
        walker = Walker(models.model, models.before, models.model.policy)

        def play(share: float, task: WordsTask) -> list[float]:
            with monkeypatch.context() as patched:
                patched.setattr(walker, "at", lambda _: Walker.at(walker, share))
                rounds = [path._piece(walker, models, config, task, heldout(r), (100 + r, 0))[1] for r in range(4)]
            return [reward for rows in rounds for _, reward in rows]

        said = []
        for share in (0.0, 1.0):
            play(share, heard := WordsTask(set()))
            said.append(Counter(" ".join(heard.texts).split()))
        task = WordsTask({word for word in said[1] if said[1][word] > said[0][word]})
        first, last = (np.array(play(share, task)) for share in (0.0, 1.0))
        rise, noise = last.mean() - first.mean(), 1.96 * np.sqrt((first.var() + last.var()) / len(first))
        assert rise > 3 * noise, "the two policies must differ for this to say anything"
        monkeypatch.setattr(path, "ROUNDS", 3)
        walked = path.walk(models, config, task, Clock(600), 1.0)
        assert walked.sizes.tolist() == [path.GROUP * path.PIECES] * path.PROMPTS * path.ROUNDS
        total = gain.estimate(walked.parts, walked.prompts, walked.sizes)
        assert abs(total.mean - rise) < noise + total.high - total.mean
        assert total.low > 0

    def test_nothing_judged_is_no_gain(self, explored_run, loaded, monkeypatch):
        config = load_config(explored_run / "config.yaml", [], check_paths=False)
        monkeypatch.setattr(path, "judged_tokens", lambda *_: Failure(kind="broken", message=""))
        assert path.walk(loaded[1], config, Countdown(), Clock(0.0), 1.0) is None


class TestReading:
    def test_every_choice_is_read_by_both_policies(self, loaded):
        corpus, models = loaded
        found = read(corpus, models, Clock(600), 1.0)
        assert found.rows.tolist() == list(range(len(corpus)))
        assert found.choices.tolist() == corpus.choices.tolist()
        assert np.allclose(found.before.sum(1), 1, atol=1e-5)
        # The last version is the policy after RL: what it was sampled with is what is read.
        last = corpus.versions[corpus.rows[found.choices]] == corpus.versions.max()
        own = found.after[np.arange(len(found.choices)), corpus.actions[found.choices]]
        assert np.allclose(np.log(own[last]), corpus.logp[found.choices][last], atol=1e-3)

    def test_one_batch_is_read_however_little_time_there_is(self, loaded, monkeypatch):
        monkeypatch.setattr("pipeline.pages.explorer.reading.ROWS_AT_ONCE", 5)
        corpus, models = loaded
        found = read(corpus, models, Clock(0.0), 0.4)
        assert len(found.rows) == 5
        assert set(corpus.rows[found.choices]) == set(found.rows)

    def test_effects_against_one_state_computed_by_hand(self, loaded):
        corpus, models = loaded
        found = read(corpus, models, Clock(600), 1.0)
        codes = corpus.actions[found.choices]
        sums = effects(found, codes, models, Clock(600), 1.0)
        code = int(np.bincount(codes).argmax())
        own = [i for i, s in enumerate(found.states) if codes[s] == code]
        assert sums.counts[code] == len(own) > 4
        expected = 0.0
        for i in own:
            world = torch.log_softmax(models.model.world_logits_of_all(found.final[i : i + 1])[0].double(), -1).detach()
            mixture = torch.from_numpy(found.before[found.states[i]]).double() @ world.exp()
            expected += float((world[code].exp() * (world[code] - mixture.log())).sum())
        assert sums.strength(code) == pytest.approx(expected / len(own), rel=1e-3)
        assert float(sums.mixture[code].sum()) / len(own) == pytest.approx(1.0, abs=1e-4)
        tops = [torch.from_numpy(found.before[found.states[i]]) @ world_of(models, found, i).exp() for i in own]
        moved = [int(world_of(models, found, i)[code].argmax() != m.argmax()) for i, m in zip(own, tops, strict=True)]
        assert sums.acts(code) == pytest.approx(sum(moved) / len(own))
        same = [int((t := world_of(models, found, i).argmax(-1))[0] == t[1]) for i in range(len(found.states))]
        assert float(sums.agree[0, 1]) == sum(same) and float(sums.agree[2, 2]) == sums.states
        (near, agreement, more, less), *_ = sums.near(0)
        assert near != 0 and 0 <= agreement <= 1 and all(p > 0 for _, p in more + less)
        raised = sums.top(code)
        assert raised[0][1] - raised[0][2] == max(p - m for _, p, m, _ in raised)

    def test_mixed_late_groups_are_explained_first(self, loaded):
        corpus, _ = loaded
        chosen = to_explain(corpus, np.arange(len(corpus)), 4)
        assert len(set(chosen)) == 4
        assert corpus.groups[chosen[0]] == corpus.groups[chosen[1]] == corpus.groups.max()
        assert corpus.rewards[chosen[0]] > corpus.rewards[chosen[1]]

    def test_alternatives_add_up_codes_that_lead_to_one_token(self):
        found = alternatives([4, 9, 4], [0, 1, 2], [0.1, 0.9, 0.0], [0.5, 0.2, 0.3])
        assert [(a.token, a.code, a.codes) for a in found] == [(9, 1, 1), (4, 0, 2)]
        assert (found[1].before, found[1].after) == pytest.approx((0.1, 0.8))

    def test_a_prompt_that_the_task_no_longer_has_is_not_judged(self):
        task = Countdown()
        text = task.prompts("train")[3].text
        assert prompt_of(task, "countdown/train/3", text) is not None
        assert prompt_of(task, "countdown/train/3", "another") is None
        assert prompt_of(task, "countdown/train/99999999", text) is None


def world_of(models: Models, found: Read, i: int) -> torch.Tensor:
    """log p(token | code) [N, V] at one state."""
    return torch.log_softmax(models.model.world_logits_of_all(found.final[i : i + 1])[0].float(), -1).detach()


class TestDataset:
    def test_everything_refers_to_something_that_is_there(self, explored):
        data, corpus, _ = explored
        assert len(data.codes) == 8 and len(data.rollouts) == len(corpus) == 48
        words, rollouts = len(data.vocabulary), len(data.rollouts)
        assert all(t < words for r in data.rollouts for t in r.tokens)
        assert all(c.rollout is None or c.rollout < rollouts for code in data.codes for c in code.contexts)
        assert all(t < words for code in data.codes for c in code.contexts for t in (*c.before, c.token))
        assert {s.name for s in data.splits} >= {"position", "task"}
        assert sum(code.usage for code in data.codes) == pytest.approx(1)
        assert sum(code.uses for code in data.codes) == len(corpus.choices)

    def test_gains_of_codes_and_of_positions_add_up(self, explored_run, monkeypatch):
        monkeypatch.setattr("pipeline.pages.explorer.build.build_task", lambda _: WordsTask(set(Countdown.words[:80])))
        data = explore(explored_run, Explorer(seconds=1e-6, explained=0))[0]
        total = sum(code.gain.mean for code in data.codes)
        assert total == pytest.approx(data.summary.gain.mean)
        assert total != 0
        assert sum(map(sum, data.splits[0].gain)) == pytest.approx(total)
        assert all(split.gain == () for split in data.splits[1:])

    def test_explained_choices_say_what_would_have_been(self, explored):
        data = explored[0]
        assert len(data.why) == 3
        for why in data.why:
            shown = data.rollouts[why.rollout]
            assert [step.position for step in why.steps] == list(range(len(shown.tokens)))
            for step in why.steps:
                taken = step.options[0]
                assert taken.code == shown.codes[step.position] and taken.token == shown.tokens[step.position]
                assert round(100 * taken.before) == shown.before[step.position]
                assert sum(mass[2] for mass in step.masses) <= 1 + 1e-6
                if step.endings:
                    first, *others = step.endings
                    assert first.code == taken.code and first.tokens[0] == taken.token
                    assert all(other.tokens[0] != taken.token for other in others)
        assert any(len(step.endings) > 1 for why in data.why for step in why.steps)

    def test_without_seconds_no_model_is_loaded(self, explored_run, monkeypatch):
        monkeypatch.setattr("pipeline.pages.explorer.build.load_models", lambda *_: pytest.fail("loaded"))
        data, _, _ = explore(explored_run, Explorer(seconds=0))
        assert data.summary.gain is None and not data.why
        assert "seconds is 0" in data.summary.notes[0]
        assert "null" in embedded({"runs": [data]})

    def test_what_time_cut_off_is_said(self, explored_run, monkeypatch):
        monkeypatch.setattr("pipeline.pages.explorer.reading.ROWS_AT_ONCE", 8)
        data, _, _ = explore(explored_run, Explorer(seconds=1e-6, explained=4))
        assert "choices of 8 of 48 rollouts" in data.summary.notes[0]
        assert len(data.why) == 4  # a number of the config, whatever the time
        assert sum(bool(r.before) for r in data.rollouts) == 8

    def test_fewer_rollouts_are_whole_groups(self, explored_run):
        data, _, _ = explore(explored_run, Explorer(seconds=0, rollouts=8))
        assert len(data.rollouts) == 8
        assert len({r.update for r in data.rollouts}) == 2

    def test_json_has_every_record(self, explored):
        assert json.loads(embedded({"runs": explored[:1]}))["runs"][0]["summary"]["turns"] == 1


class TestEpisodes:
    """Agents: two turns, with what the world said between them."""

    def test_what_the_world_said_has_no_codes(self, explored_episodes):
        data, corpus, _ = explored_episodes
        assert data.summary.turns == 2
        for shown in data.rollouts:
            seen = [i for i, code in enumerate(shown.codes) if code < 0]
            assert len(seen) == SAID and seen == list(range(seen[0], seen[0] + SAID)) and seen[0] > 0
            assert all(shown.chances[i] == shown.before[i] == -1 for i in seen)
            assert all(shown.chances[i] >= 0 for i in range(len(shown.codes)) if i not in seen)
            assert shown.turn_rewards == (0.0, pytest.approx(shown.reward, abs=1e-6))
        assert (
            sum(code.uses for code in data.codes) == len(corpus.choices) == corpus.generated.sum() < len(corpus.tokens)
        )

    def test_the_policies_are_read_at_generated_tokens_after_all_that_was_seen(self, episodes_run):
        config = load_config(episodes_run / "config.yaml", [], check_paths=False)
        corpus, _, _ = read_corpus(episodes_run, num_actions=8, span=1)
        models = load_models(*policies_of(episodes_run), config, AutoTokenizer.from_pretrained(config.base.model))
        found = read(corpus, models, Clock(600), 1.0)
        assert found.choices.tolist() == np.flatnonzero(corpus.generated).tolist()
        last = corpus.versions[corpus.rows[found.choices]] == UPDATES - 1
        own = found.after[np.arange(len(found.choices)), corpus.actions[found.choices]]
        assert np.allclose(np.log(own[last]), corpus.logp[found.choices][last], atol=1e-3)

    def test_what_is_not_computed_is_said_and_the_rest_is_there(self, explored_episodes):
        data = explored_episodes[0]
        assert data.summary.gain is None and all(code.gain is None for code in data.codes)
        assert any("which codes carry the gain" in note and "not computed" in note for note in data.summary.notes)
        assert data.why and all(step.options and not step.endings for one in data.why for step in one.steps)
        one = data.why[0]
        assert [step.position for step in one.steps] == [
            i for i, code in enumerate(data.rollouts[one.rollout].codes) if code >= 0
        ]
        turn = {split.name: split for split in data.splits}["turn"]
        assert turn.keys == ("0", "1") and all(count >= len(data.rollouts) for count in turn.counts)
        assert all(code.strength is not None for code in data.codes if code.uses)


class TestPage:
    def test_hostile_texts_cannot_leave_the_data(self):
        text = page([made_up(codes=4, rollouts=8)])
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
        assert "<" not in data and ">" not in data and "&" not in data
        assert json.loads(data)["runs"][0]["vocabulary"][0] == HOSTILE
        assert text.count("<script") == 2

    def test_only_its_own_style_and_script_may_run(self):
        text = page([made_up(codes=4, rollouts=8)])
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy and "http" not in policy
        assert not re.search(r'(src|href)="(?!#)', text)
        assert " style=" not in text and " onclick=" not in text

    def test_the_script_never_parses_text_as_html(self):
        script = "".join(asset(name, "pipeline.pages.explorer") for name in SCRIPTS)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\(", script
        )
        assert script.isascii()

    @pytest.mark.slow
    @pytest.mark.parametrize("codes", [64, 128])
    def test_2000_rollouts_stay_under_5_megabytes_at_the_most_tokens_there_are(self, codes):
        tokens = build.TOKENS_SHOWN // 2000
        assert len(page([made_up(codes=codes, tokens=tokens, explained=4)])) + MOST_CHARACTERS < 5_000_000


class TestCommand:
    def test_explain_writes_the_page_and_says_which_codes(self, explored_run, tmp_path):
        arguments = [
            "explain",
            str(explored_run),
            "-o",
            str(tmp_path / "x.html"),
            "--explained",
            "1",
            "--seconds",
            "0.1",
        ]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert "estimated gain" in done.stdout and "not in MLflow" in done.stdout
        assert "<main" in (tmp_path / "x.html").read_text(encoding="utf-8")

    def test_two_runs_are_put_side_by_side(self, explored_run, tmp_path):
        arguments = [
            "explain",
            str(explored_run),
            "--against",
            str(explored_run),
            "--seconds",
            "0",
            "-o",
            str(tmp_path / "x.html"),
            "--json",
        ]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert [run["run"] for run in json.loads(done.stdout)["runs"]] == ["small", "small"]

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda run: (run / "config.yaml").unlink(), "is not a run folder"),
            (
                lambda run: (run / "stages" / "improve.json").unlink(),
                f"not through with its stage improve (interrupted: last seen in stage improve at step {UPDATES} of",
            ),
            (lambda run: (run / "stages" / "improve.json").write_text("{"), "improve.json is damaged"),
            (
                lambda run: (run / "checkpoints" / "improve" / WEIGHTS).unlink(),
                f"improve is damaged ({WEIGHTS} is missing",
            ),
            (
                lambda run: section(run, "improve", {"level": "token"}),
                "over tokens (improve.level: token), where there are no codes",
            ),
            (lambda run: section(run, "improve", None), "has no stage improve"),
            (lambda run: offline(run), "was improved offline only, from the rollouts of"),
        ],
    )
    def test_what_cannot_be_explained_is_refused_in_words(self, copied, damage, said):
        damage(copied)
        done = CliRunner().invoke(app, ["explain", str(copied)])
        assert (done.exit_code, done.stdout) == (USAGE, "")
        assert said in done.stderr and "Traceback" not in done.stderr
        assert not (copied / "explorer.html").exists()

    def test_damage_inside_of_a_checkpoint_is_found_before_it_is_read(self, copied):
        weights = copied / "checkpoints" / "clone" / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        done = CliRunner().invoke(app, ["explain", str(copied)])
        assert done.exit_code == FAILED
        assert "clone is damaged" in done.stderr

    def test_a_damaged_shard_is_left_out_and_said_on_the_page(self, copied):
        first, second = sorted((copied / "replay").rglob("*.parquet"))
        first.write_bytes(first.read_bytes()[:-9])
        arguments = ["explain", str(copied), "--seconds", "0"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.stderr
        assert "note: a shard of the replay buffer is damaged or missing, and left out: run=" in done.stdout
        second.write_bytes(b"")
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == FAILED
        assert (
            "holds no judged rollout" in done.stderr
            and "2 shards of the replay buffer are damaged or missing" in done.stderr
        )


class TestEndOfRun:
    def context(self, folder: Path, **changed: object) -> StageContext:
        config = load_config(
            folder / "config.yaml", [f"explorer.{k}={v}" for k, v in changed.items()], check_paths=False
        )
        return StageContext(config=config, run_dir=folder, log=RunLog(folder, quiet=True), task=Countdown())

    def test_a_run_ends_with_its_page_unless_switched_off(self, copied):
        folder = copied
        write_at_end(self.context(folder, enabled=False))
        assert not (folder / "explorer.html").exists()
        write_at_end(self.context(folder))
        assert (folder / "explorer.html").is_file()

    def test_it_never_fails_the_run(self, copied, capsys):
        folder = copied
        shutil.rmtree(folder / "replay")
        context = self.context(folder)
        context.log.display = automatic()
        write_at_end(context)
        assert not (folder / "explorer.html").exists()
        assert "not written" in capsys.readouterr().out
