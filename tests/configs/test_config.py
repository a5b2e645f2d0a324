"""Reading configs: every problem at once, with the place, the value and the remedy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from configs.complaints import known_keys
from configs.loading import ConfigErrors, config_schema, dump_config, load_config
from configs.recipes import RECIPES, by_hand, differing
from configs.reference import reference
from configs.renamed import RENAMED, hint
from configs.schema import Improve, RunConfig
from configs.yaml_text import YamlProblem, read, write
from pipeline.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = "base: {model: some-org/some-model}\n"
CLONED = "actions: {}\nclone: {}\n"


@pytest.fixture
def write_config(tmp_path):
    def make(text: str = "", name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(MINIMAL + text, encoding="utf-8")
        return path

    return make


def errors_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_config(path, overrides)
    return caught.value.messages


def only_error(path: Path, *overrides: str) -> str:
    messages = errors_of(path, *overrides)
    assert len(messages) == 1, messages
    return messages[0]


class TestGoodConfigs:
    @pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
    def test_shipped_configs_survive_dump_and_load(self, path, tmp_path):
        config = load_config(path, check_paths=False)
        copy = tmp_path / "config.yaml"
        copy.write_text(dump_config(config), encoding="utf-8")
        assert load_config(copy, check_paths=False) == config

    def test_no_is_a_word_and_1e_3_a_number(self, write_config):
        config = load_config(write_config("actions: {mixed_precision: no, learning_rate: 1e-3}\n"))
        assert config.actions.mixed_precision == "no"
        assert config.actions.learning_rate == 0.001

    def test_overrides_win_create_sections_and_remove_them(self, write_config):
        path = write_config("actions: {updates: 5}\nclone: {updates: 6}\n")
        config = load_config(
            path,
            [
                "improve.updates=3",
                "actions.updates=7",
                "improve.mode=async",
                "task.options.numbers=4",
                "evaluation=null",
            ],
        )
        assert (config.improve.updates, config.improve.mode, config.actions.updates) == (3, "async", 7)
        assert config.task.options == {"numbers": 4}
        assert config.evaluation is None
        assert config.stages == ("actions", "clone", "improve")

    def test_an_override_may_be_a_list_of_mappings(self, write_config, tmp_path):
        (tmp_path / "text.txt").write_text("hello")
        config = load_config(write_config(), ["actions.data=[{kind: task, weight: 2}, {kind: text, path: text.txt}]"])
        assert [source.kind for source in config.actions.data] == ["task", "text"]
        assert config.actions.data[1].path == str(tmp_path / "text.txt")

    def test_the_last_override_of_a_key_counts(self, write_config):
        assert load_config(write_config(), ["seed=1", "seed=2"]).seed == 2

    def test_paths_are_relative_to_the_file_not_to_the_process(self, write_config, tmp_path, monkeypatch):
        (tmp_path / "models" / "tiny").mkdir(parents=True)
        path = write_config()
        path.write_text("base: {model: models/tiny}\n")
        monkeypatch.chdir(ROOT)
        assert load_config(path).base.model == str(tmp_path / "models" / "tiny")

    def test_a_hub_id_and_the_bundled_model_stay(self, write_config):
        assert load_config(write_config()).base.model == "some-org/some-model"
        assert load_config(write_config(), ["base.model=smollm2-135m-instruct"]).base.model == "smollm2-135m-instruct"

    def test_schema_describes_every_section_and_field(self):
        schema = config_schema()
        assert set(schema["properties"]) == set(RunConfig.model_fields)
        assert schema["$defs"]["Improve"]["properties"]["group_size"]["description"].startswith("Rollouts per prompt")


class TestUnknownKeys:
    def test_near_match_in_the_section(self, write_config):
        assert only_error(write_config("improve: {updats: 3}\n")) == (
            "improve.updats: unknown; did you mean improve.updates? [line 2]"
        )

    def test_a_key_of_another_section(self, write_config):
        assert "did you mean improve.group_size?" in only_error(write_config("rollout: {group_size: 8}\n"))
        assert "improve.updates" in only_error(write_config("updates: 3\n"))

    def test_a_misspelt_section(self, write_config):
        assert "did you mean rollout?" in only_error(write_config("rolout: {}\n"))

    def test_no_near_match_lists_the_keys(self, write_config):
        assert "replay has enabled, rows_per_shard" in only_error(write_config("replay: {xyzzy: 1}\n"))

    def test_in_a_list_and_in_an_override(self, write_config):
        assert "did you mean actions.data[0].kind?" in only_error(write_config(), "actions.data=[{knd: task}]")
        message = only_error(write_config(), "improve.lerning_rate=3")
        assert (
            message
            == "improve.lerning_rate: unknown; did you mean improve.learning_rate? [override improve.lerning_rate=3]"
        )

    @pytest.mark.parametrize("key", [k for k in known_keys() if k.count(".") == 1 and not k.startswith("base.")])
    def test_every_key_is_found_from_a_slip(self, key, write_config):
        section, name = key.split(".")
        slip = name[:-1] + "xq" if len(name) > 4 else name + "x"
        messages = errors_of(write_config(f"{section}: {{{slip}: 1}}\n"))
        assert any(f"did you mean {key}?" in m for m in messages), messages


class TestWrongValues:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("seed: three", 'seed: expected a whole number, got "three" (text) [line 2]'),
            ("seed: '3'", 'seed: expected a whole number, got "3" (text) [line 2]'),
            ("seed: true", "seed: expected a whole number, got true (true/false) [line 2]"),
            ("seed: -1", "seed: expected a number of at least 0, got -1 (number) [line 2]"),
            ("rollout: {num_workers: 2.5}", "rollout.num_workers: expected a whole number, got 2.5 (number) [line 2]"),
            ("rollout: {temperature: .inf}", "rollout.temperature: expected a finite number, got inf"),
            ("replay: {enabled: no}", 'replay.enabled: expected true or false, got "no" (text) [line 2]'),
            ("replay: 3", "replay: expected a section with keys of its own, got 3 (number) [line 2]"),
            ("replay:", "replay: expected a section with keys of its own, got null [line 2]"),
            (
                "actions: {data: {kind: task}}",
                'actions.data: expected a list, e.g. [{kind: task}], got {"kind": "task"} (mapping) [line 2]',
            ),
        ],
    )
    def test_says_place_expectation_and_value(self, text, wanted, write_config):
        assert wanted in errors_of(write_config(text + "\n"))

    def test_a_near_word_of_a_choice(self, write_config):
        message = only_error(write_config("improve: {mode: asinc}\n"))
        assert message.startswith("improve.mode: expected 'sync' or 'async', got \"asinc\" (text); did you mean async?")

    def test_a_missing_base_says_what_to_write(self, write_config):
        path = write_config()
        path.write_text("seed: 1\n")
        assert only_error(path) == "base: missing; e.g. base: {model: models/countdown-1m}"


class TestFilesAndPaths:
    def test_missing_file_names_the_near_one(self, write_config):
        path = write_config(name="quickstart.yaml")
        assert f"did you mean {path}?" in only_error(path.with_name("quikstart.yaml"))

    def test_folder_list_and_empty_file(self, write_config, tmp_path):
        assert "is a folder" in only_error(tmp_path)
        path = write_config()
        for text, found in (("- 1\n- 2\n", "[1, 2] (list)"), ("", "null"), ("hello", '"hello" (text)')):
            path.write_text(text)
            assert found in only_error(path)

    def test_syntax_error_names_the_line(self, write_config):
        assert "line 3" in only_error(write_config("task: {name: countdown\nactions: {}\n"))

    def test_duplicate_keys_are_errors(self, write_config):
        message = only_error(write_config("seed: 1\nrollout:\n  top_k: 1\n  top_k: 2\n"))
        assert message == "rollout.top_k: written twice, in lines 4 and 5; keep one"

    def test_a_programs_interpreter_stays_a_link(self, write_config, tmp_path):
        """A virtual environment's python is a link to another one: followed, it would be that."""
        (tmp_path / "venv").mkdir()
        (tmp_path / "venv" / "python").symlink_to(sys.executable)
        there = str(tmp_path / "venv" / "python")
        for task, found in (
            ("gateway/x, options: {interpreter: venv/python}", there),
            ("gateway/x, options: {interpreter: node}", "node"),
            ("verifiers/x, options: {python: venv/python}", there),
            (f"verifiers/x, options: {{python: {there}}}", there),
        ):
            config = load_config(write_config(f"task: {{name: {task}}}\n"), check_paths=False)
            assert list(config.task.options.values()) == [found]

    def test_missing_paths_name_the_near_ones(self, write_config, tmp_path):
        (tmp_path / "models" / "countdown-1m").mkdir(parents=True)
        path = write_config("actions: {data: [{kind: text, path: nothing.txt}], init: runs/x}\n")
        path.write_text(path.read_text().replace("some-org/some-model", "models/countdown-1n"))
        messages = errors_of(path)
        assert f"did you mean {tmp_path / 'models' / 'countdown-1m'}?" in messages[0]
        assert [m.partition(":")[0] for m in messages] == ["base.model", "actions.data[0].path", "actions.init"]
        assert load_config(path, check_paths=False).base.model == str(tmp_path / "models" / "countdown-1n")

    def test_a_base_to_be_trained_may_be_missing(self, write_config, tmp_path):
        path = write_config()
        path.write_text("base: {model: models/new, train: {updates: 1}}\n")
        assert load_config(path).base.model == str(tmp_path / "models" / "new")

    def test_a_slip_of_the_bundled_model(self, write_config):
        assert "did you mean smollm2-135m-instruct?" in only_error(write_config(), "base.model=smollm2-135m-instuct")


class TestOverrideSyntax:
    @pytest.mark.parametrize("bad", ["improve.updates", "=3", "improve..updates=3", ".seed=1"])
    def test_form(self, bad, write_config):
        assert (
            only_error(write_config(), bad) == f"override {bad!r}: expected section.key=value, e.g. improve.updates=3"
        )

    def test_yaml_in_the_value(self, write_config):
        assert "not valid YAML" in only_error(write_config(), "actions.data=[{kind: task")

    def test_below_a_value_and_below_a_list(self, write_config):
        assert "seed has no keys of its own" in only_error(write_config(), "seed.x=1")
        assert "give it whole, actions.data=" in only_error(
            write_config("actions: {data: [{kind: task}]}\n"), "actions.data.x=1"
        )

    def test_an_unknown_section_is_named_with_its_near_match(self, write_config):
        assert "did you mean improve?" in only_error(write_config(), "improv.updates=3")


class TestCrossFieldChecks:
    @pytest.mark.parametrize(
        ("overrides", "place"),
        [
            (["clone={}"], "clone: needs latent actions"),
            (["improve={}"], "improve: needs latent actions"),
            (["actions={}", "improve={}"], "improve: needs a cloned policy"),
            (["actions={}", "finetune.codes=policy"], "finetune: needs a cloned policy"),
            (["actions.init=.", "finetune.codes=inverse_dynamics"], "finetune.codes: "),
            (["actions={}", "clone={}", "improve={mode: async, max_staleness: 0}"], "improve.max_staleness: 0"),
            (["actions={}", "clone={}", "improve={stale: drop}"], "improve.stale: drop is for improve.mode async"),
            (
                ["actions={}", "clone={}", "improve={mode: async, stale: reweight}"],
                "improve.stale: reweight truncates weights",
            ),
            (
                ["actions={}", "clone={}", "improve={refresh_in_flight: true}"],
                "improve.refresh_in_flight: true is for improve.mode async",
            ),
            (
                [
                    "actions={}",
                    "clone={}",
                    "improve={mode: async, refresh_in_flight: true}",
                    "rollout.engine=simulated",
                    "evaluation=null",
                ],
                "improve.refresh_in_flight: true needs rollout.engine: local",
            ),
            (["actions={}", "improve={level: token, token_baseline: true}"], "improve.token_baseline: true"),
            (["improve.level=token"], "improve: needs latent actions"),
            (
                ["actions={}", "improve={level: token, minibatches: 1000}"],
                "improve.minibatches: 1000 pieces for each of 1 learners",
            ),
            (
                ["actions={}", "improve={level: token, minibatches: 3}"],
                "improve.minibatches: 3 pieces for each of 1 learners",
            ),
            (
                ["actions={}", "improve={level: token}", "cluster.num_learners=3"],
                "improve.prompts_per_update: 16 does not divide",
            ),
            *(
                (
                    ["actions={}", "clone={}", "improve={shard: true}", f"cluster.num_learners={learners}"],
                    f"improve.shard: true splits the policy over learners, but cluster.num_learners is {learners};",
                )
                for learners in (0, 1)
            ),
            (["actions={num_workers: 3}"], "actions.batch_size: 64 does not divide"),
            (["actions={temperature: 0.1}"], "actions.final_temperature: 0.5 is above"),
            (["actions.data=[]"], "actions.data: an empty list"),
            (["actions.data=[{kind: text}]"], "actions.data[0].path: missing"),
            (["actions.data=[{kind: task, path: .}]"], "actions.data[0].path: "),
            (["actions.data=[{kind: task, min_reward: 1}]"], "actions.data[0].min_reward: 1.0 applies to kind replay"),
            (["actions.num_actions=4", "rollout.top_k=5"], "rollout.top_k: 5 is more than"),
            (["rollout={engine: vllm, static_cache: true}"], "rollout.static_cache: true is for rollout.engine local"),
            (
                ["actions={}", "clone={}", "improve={features: ship}", "rollout.engine=vllm"],
                "improve.features: ship, but rollout",
            ),
            (
                ["actions={}", "clone={}", "improve={level: token}", "rollout.engine=vllm"],
                "rollout.engine: vllm decodes latent",
            ),
            (["tracking.uri=mlruns"], "tracking.uri: 'mlruns' is not an MLflow address"),
            (["tracking.uri=sqlite:///mlflow.db"], "tracking.uri: 'sqlite:///mlflow.db' is relative"),
            (["evaluation=null"], "nothing to do"),
        ],
    )
    def test_contradiction_is_one_error(self, overrides, place, write_config):
        assert only_error(write_config(), *overrides).startswith(place)

    @pytest.mark.parametrize(
        "overrides",
        [
            ["actions={}", "clone={}", "improve={mode: async}"],
            ["actions={}", "improve={level: token, token_blocks: 1}"],
            ["actions={init: ., updates: 0}", "improve={}"],
            ["actions={}", "clone={}", "finetune={codes: inverse_dynamics}", "tracking.uri=http://localhost:5000"],
        ],
    )
    def test_fitting_fields_pass(self, overrides, write_config):
        assert "evaluate" in load_config(write_config(), overrides).stages


def test_what_is_right_is_still_known_when_something_is_wrong(write_config):
    with pytest.raises(ConfigErrors) as caught:
        load_config(write_config("task: {name: nonsense}\nrollout: {num_workers: many, top_p: 1}\n"))
    assert caught.value.partial is not None
    assert caught.value.partial.task.name == "nonsense"
    assert caught.value.dropped == ["rollout.num_workers"]


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_yaml_writes_what_it_reads(value):
    assert read(write(value))[0] == value


@pytest.mark.parametrize("text", ["no", "off", "1e-3x", "2024-01-01", "12:30", "0x10", "1_000"])
def test_words_that_yaml_1_1_would_change_stay_words(text):
    assert read(text)[0] == text


def test_a_tag_that_would_run_code_is_refused():
    with pytest.raises(YamlProblem):
        read("!!python/object/apply:os.system [echo]")


class TestRecipes:
    @pytest.mark.parametrize("name", RECIPES)
    def test_a_recipe_fills_its_settings(self, write_config, name):
        config = load_config(write_config(f"{CLONED}improve: {{recipe: {name}}}\n"))
        for place, value in RECIPES[name].items():
            section, key = place.split(".")
            assert getattr(getattr(config, section), key) == value, place
        assert by_hand(config) == {} and list(differing(config)) == []

    def test_the_schema_and_the_table_name_the_same_recipes(self):
        assert set(get_args(Improve.model_fields["recipe"].annotation)[0].__args__) == RECIPES.keys()
        assert {place for settings in RECIPES.values() for place in settings} <= set(known_keys())

    def test_what_is_set_by_hand_stays_and_is_named(self, write_config):
        path = write_config(f"{CLONED}reward: {{overlong_share: 0.5}}\nimprove: {{recipe: dapo, clip_low: 0.1}}\n")
        config = load_config(path, ["improve.clip_high=0.3"])
        assert (config.improve.clip_low, config.improve.clip_high, config.reward.overlong_share) == (0.1, 0.3, 0.5)
        assert config.improve.mask_truncated is True and config.improve.loss_mean == "token"
        assert list(differing(config)) == [
            "improve.clip_low: 0.1 is set by hand, improve.recipe: dapo has 0.2",
            "improve.clip_high: 0.3 is set by hand, improve.recipe: dapo has 0.28",
            "reward.overlong_share: 0.5 is set by hand, improve.recipe: dapo has 0.2",
        ]

    def test_an_override_names_a_recipe_and_a_dump_holds_what_it_filled(self, write_config, tmp_path):
        config = load_config(write_config(f"{CLONED}improve: {{updates: 3}}\n"), ["improve.recipe=gspo"])
        assert (config.improve.ratio, config.improve.clip_high) == ("sequence", 4e-4)
        copy = tmp_path / "config.yaml"
        copy.write_text(dump_config(config), encoding="utf-8")
        assert load_config(copy) == config

    @pytest.mark.parametrize("value", ["dappo", "[dapo]", "3"])
    def test_a_recipe_that_is_none_is_an_error_that_names_those_there_are(self, write_config, value):
        message = only_error(write_config(f"improve: {{recipe: {value}}}\n"))
        assert message.startswith("improve.recipe: expected 'dapo', 'dr_grpo', 'gspo' or 'cispo', got")

    def test_a_section_that_is_none_is_the_users_error(self, write_config):
        assert only_error(write_config("reward: 3\nimprove: {recipe: dapo}\n")).startswith("reward: expected a section")

    def test_show_and_reference_say_what_a_recipe_fills(self, write_config):
        path = write_config(f"{CLONED}improve: {{recipe: dr_grpo, algorithm: grpo}}\n")
        shown = CliRunner().invoke(app, ["config", "show", str(path)]).output
        assert "# improve.recipe: dr_grpo has improve.loss_mean: constant\n" in shown
        assert "# improve.algorithm: grpo is set by hand, improve.recipe: dr_grpo has dr_grpo\n" in shown
        assert "\n  loss_mean: constant\n" in shown
        assert "| `dr_grpo` | `improve.algorithm: dr_grpo`, `improve.loss_mean: constant` |" in reference(
            config_schema()
        )


class TestChoiceOfPrompts:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ("dynamic_sampling: 2, mode: async", "improve.dynamic_sampling: 2 is for improve.mode sync"),
            ("curriculum: 0.5, mode: async", "improve.curriculum: 0.5 is for improve.mode sync"),
            ("curriculum: 0.5, group_size: 1, algorithm: ppo", "improve.curriculum: 0.5 compares a prompt's rollouts"),
            ("dynamic_sampling: 1, algorithm: remax", "improve.dynamic_sampling: 1 leaves out groups"),
            ("dynamic_sampling: 1, algorithm: ppo", "improve.dynamic_sampling: 1 leaves out groups"),
        ],
    )
    def test_what_cannot_be_together_is_named(self, write_config, settings, said):
        assert only_error(write_config(f"{CLONED}improve: {{{settings}}}\n")).startswith(said)

    def test_several_learners_are_refused(self, write_config):
        path = write_config(f"{CLONED}improve: {{dynamic_sampling: 1}}\ncluster: {{num_learners: 2}}\n")
        assert only_error(path).startswith("improve.dynamic_sampling: 1, but what is left of an update")

    def test_the_defaults_say_nothing(self, write_config):
        config = load_config(write_config(f"{CLONED}improve: {{mode: async, algorithm: ppo}}\n"))
        assert config.improve.dynamic_sampling == 0 and config.improve.curriculum == 1


class TestRenamed:
    OLD = f"{CLONED}improve: {{updates: 3, aliases: 8}}\n"

    @pytest.fixture(autouse=True)
    def forget(self):
        hint.cache_clear()

    def test_every_old_name_leads_to_a_key_and_is_none(self):
        assert set(RENAMED.values()) <= set(known_keys()) and not RENAMED.keys() & set(known_keys())

    def test_an_old_name_is_read_with_one_line_that_names_the_new_one(self, write_config, caplog):
        path = write_config(self.OLD)
        for _ in range(2):
            assert load_config(path).improve.equivalent_codes == 8
        said = f"{path}: improve.aliases is now called improve.equivalent_codes; the old name is still read"
        assert [record.message for record in caplog.records] == [said]

    def test_an_override_may_have_the_old_name(self, write_config):
        config = load_config(write_config(f"{CLONED}improve: {{updates: 3}}\n"), ["improve.aliases=4"])
        assert config.improve.equivalent_codes == 4

    def test_both_names_are_an_error_with_its_line(self, write_config):
        path = write_config(f"{CLONED}improve:\n  equivalent_codes: 4\n  aliases: 8\n")
        text = "improve.aliases: the old name of improve.equivalent_codes, and both are set; leave improve.aliases out"
        assert only_error(path) == f"{text} [line 6]"
        assert only_error(write_config(self.OLD), "improve.equivalent_codes=4") == f"{text} [line 4]"

    def test_a_wrong_value_is_named_by_the_new_name_and_the_old_names_line(self, write_config):
        found = only_error(write_config(f"{CLONED}improve:\n  aliases: 0\n"))
        assert found == "improve.equivalent_codes: expected a number greater than 0, got 0 (number) [line 5]"

    def test_the_config_of_a_finished_run_holds_null_and_says_nothing(self, write_config, caplog):
        """An earlier version dumped every key; a new name beside the old one's null is a setting."""
        path = write_config(f"{CLONED}improve: {{updates: 3, aliases: null}}\n")
        assert load_config(path).improve.equivalent_codes is None and not caplog.records
        assert load_config(path, ["improve.equivalent_codes=4"]).improve.equivalent_codes == 4

    @pytest.mark.parametrize("text", ["improve: 3\n", "improve: [aliases]\n"])
    def test_a_section_that_is_none_stays_the_users_error(self, write_config, text):
        assert only_error(write_config(CLONED + text)).startswith("improve: expected a section")
