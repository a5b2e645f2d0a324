"""The shape of the code, read from its syntax trees: who imports whom, and what is nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from pipeline.runs import layout, stage_table

ROOT = Path(__file__).resolve().parent.parent
# Package -> ours that it may import, besides itself. One way only.
ARROWS = {
    "configs": set(),
    "latent_control": {"configs"},
    "rollout_workers": {"configs", "latent_control"},
    "learners": {"configs", "latent_control"},
    "pipeline": {"configs", "latent_control", "rollout_workers", "learners"},
}
# Room of pipeline/ -> rooms that it may import, besides itself and what those may import: top to bottom, one way only.
ROOMS = (
    {"__main__"},
    {"cli"},
    {"job"},
    {"bank", "watch"},
    {"experiments"},
    {"integrity"},
    {"run"},
    {"steering"},
    {"serving"},
    {"stages"},
    {"pages"},
    {"rl"},
    {"preflight"},
    {"tracking"},
    {"cluster", "data"},
    {"runs"},
    {"replay"},
    {"evaluation"},
    {"storage", "console", "web"},
    {"names"},
)
# Files that hold names alone: a room of their own, below all others.
NAMES = {"pipeline/runs/layout.py", "pipeline/runs/stage_table.py"}
# Files and what they import against the arrows; to be cut, never added to.
AGAINST_THE_ARROWS: set[tuple[str, str]] = set()
# Files that import each other in a circle, lazy and TYPE_CHECKING imports counted; to be cut, never added to.
CIRCLES: set[frozenset[str]] = set()
# Package -> third-party packages it must not touch, anywhere.
HEAVY = {
    "configs": {"torch", "ray", "transformers", "mlflow", "pyarrow", "numpy", "accelerate"},
    "latent_control": {"ray", "mlflow", "pyarrow", "pandas", "accelerate"},
    "rollout_workers": {"mlflow"},
    "learners": {"mlflow", "pyarrow"},
    "pipeline": set(),
}
RLLIB = {
    "rollout_workers/env_runner.py",
    "rollout_workers/rollouts.py",
    "learners/rl_module.py",
    "learners/learner.py",
    "learners/sharded_learner.py",
    "learners/collate.py",
    "pipeline/rl/algorithm.py",
    "pipeline/rl/config.py",
    "pipeline/stages/play.py",  # EnvRunnerGroup
}
PARQUET = {
    "pipeline/evaluation/outcome_file.py",
    "pipeline/replay/following.py",
    "pipeline/replay/heldout.py",
    "pipeline/replay/pending.py",
    "pipeline/replay/reader.py",
    "pipeline/replay/schema.py",
    "pipeline/replay/search.py",
    "pipeline/replay/shards.py",
    "pipeline/replay/writer.py",
    "pipeline/rl/ledger.py",
    "pipeline/storage/parquet_fields.py",
    "rollout_workers/tasks/row_files.py",
}
MODULES = sorted(path for package in ARROWS for path in (ROOT / package).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file, read once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of a file, walked once for all tests."""
    return list(ast.walk(tree_of(path)))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted module and line of each import, those inside functions too."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: write the whole module name"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def users_of(module: str) -> set[str]:
    return {
        name_of(path)
        for path in MODULES
        for name, _ in imports(path)
        if name == module or name.startswith(f"{module}.")
    }


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("no git checkout: the list of tracked files comes from git")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_the_reader_of_imports_sees_them_all(tmp_path):
    source = tmp_path / "m.py"
    source.write_text("import a.b\ndef f():\n    from c import d\nif True:\n    import e as x\n")
    assert {name for name, _ in imports(source)} == {"a.b", "c", "c.d", "e"}


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_one_way(package):
    assert (ROOT / package / "__init__.py").is_file()
    allowed = ARROWS[package] | {package}
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in (ROOT / package).rglob("*.py")
        for module, line in imports(path)
        if module.partition(".")[0] in (ARROWS.keys() - allowed) | HEAVY[package] | {"tests", "benchmarks"}
    ]
    assert not wrong


def file_graph() -> dict[str, set[str]]:
    """File -> files of ours that it imports, wherever in the file; of a package's submodule, the submodule alone."""
    files = {".".join(Path(name_of(p)).with_suffix("").parts).removesuffix(".__init__"): name_of(p) for p in MODULES}

    def imported(path: Path) -> Iterator[str]:
        for node in nodes_of(path):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if name in files else str(node.module) for name in names)

    return {
        name_of(path): {files[module] for module in imported(path) if module in files} - {name_of(path)}
        for path in MODULES
    }


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of more than one node that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set[str](), [start]
        while todo:
            found = graph[todo.pop()] - seen
            seen |= found
            todo += found
        reached[start] = seen
    return {
        frozenset(other for other in reached[node] if node in reached[other]) for node in graph if node in reached[node]
    }


def against_the_arrows(graph: dict[str, set[str]], rooms: tuple[set[str], ...]) -> set[tuple[str, str]]:
    """Imports between rooms of pipeline/ that do not lead down; a file beside the rooms is a room."""
    floor = {room: level for level, names in enumerate(rooms) for room in names}
    room_of = {
        name: "names" if name in NAMES else Path(name).with_suffix("").parts[1]
        for name in graph
        if name.startswith("pipeline/")
    }
    room_of.pop("pipeline/__init__.py", None)  # the package's face hands on what the rooms hold
    missing = set(room_of.values()) - floor.keys()
    assert not missing, f"no floor for {missing}"
    return {
        (name, other)
        for name in room_of
        for other in graph[name] & room_of.keys()
        if room_of[name] != room_of[other] and floor[room_of[name]] >= floor[room_of[other]]
    }


def test_rooms_import_downwards_only():
    assert against_the_arrows(file_graph(), ROOMS) == AGAINST_THE_ARROWS


def test_no_import_circle():
    assert circles(file_graph()) == CIRCLES


def test_the_tests_of_imports_fail_where_a_rule_is_broken():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == {frozenset({"b", "c"})}
    assert circles({"a": {"b"}, "b": set()}) == set()
    up = {"pipeline/low/x.py": {"pipeline/high/y.py"}, "pipeline/high/y.py": {"pipeline/low/z.py"}}
    up["pipeline/low/z.py"] = {"pipeline/beside/q.py"}
    up["pipeline/beside/q.py"] = set()
    assert against_the_arrows(up, ({"high"}, {"low", "beside"})) == {
        ("pipeline/low/x.py", "pipeline/high/y.py"),
        ("pipeline/low/z.py", "pipeline/beside/q.py"),
    }


def test_mlflow_is_touched_in_its_files():
    assert users_of("mlflow") <= {
        "pipeline/tracking/mlflow_store.py",
        "pipeline/tracking/mlflow_traces.py",
        "pipeline/tracking/outbox.py",
        "pipeline/tracking/results.py",
        "pipeline/serving/registry.py",
        "pipeline/serving/mlflow_model.py",
    }


def test_the_mlflow_model_needs_the_method_only():
    ours = {name.partition(".")[0] for name, _ in imports(ROOT / "pipeline/serving/mlflow_model.py")} & ARROWS.keys()
    assert ours == {"latent_control"}
    assert not any(
        name.partition(".")[0] in ARROWS.keys() - {"latent_control"}
        for path in MODULES
        if "latent_control/" in name_of(path)
        for name, _ in imports(path)
    )


def test_parquet_is_touched_in_its_files():
    assert users_of("pyarrow") <= PARQUET


def test_rllib_is_touched_in_its_files():
    assert users_of("ray.rllib") <= RLLIB


def test_ui_and_command_line_import_nothing_heavy_when_imported():
    command_line = [path for path in MODULES if path.parent == ROOT / "pipeline" / "cli"]
    assert len(command_line) > 20
    for path in (
        *command_line,
        *(
            ROOT / "pipeline/preflight" / f"{name}.py"
            for name in ("check", "problems", "base_model", "data_sources", "resources", "doctor")
        ),
        ROOT / "pipeline/tracking/server.py",
    ):
        top = tree_of(path).body
        modules = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        heavy = {
            "torch",
            "ray",
            "transformers",
            "mlflow",
            "pyarrow",
            "numpy",
            "latent_control",
            "learners",
            "rollout_workers",
        }
        assert not heavy & {module.partition(".")[0] for module in modules}, name_of(path)


def test_nothing_unpickles():
    assert not {
        user for module in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib") for user in users_of(module)
    }
    assert not [place for place, call in calls() if call in ("torch.load", "torch.save", "numpy.load", "np.load")]


def test_nothing_is_evaluated():
    assert not [place for place, call in calls() if call in ("eval", "exec", "compile", "__import__", "os.system")]


# Who may read a tokenizer's own end token or render a chat. What ends a response, and how a prompt becomes ids, is
# decided in latent_control/text.py.
END_TOKENS = {
    "latent_control/text.py",
    "latent_control/preference.py",  # reward models read whole texts, and pad with it where there is no pad token
    "latent_control/auto.py",  # generate's argument
    "learners/base_training.py",  # makes the tokenizer
    "latent_control/bases/chat_template.py",  # renders templates, within bounds
}


def test_end_tokens_and_chats_have_one_owner():
    names = {"eos_token", "eos_token_id", "apply_chat_template", "all_special_ids"}
    found = {
        name_of(path)
        for path in MODULES
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute) and node.attr in names
    }
    assert found == END_TOKENS


def calls() -> Iterator[tuple[str, str]]:
    """Place and dotted name of each call in our packages."""
    for path in MODULES:
        for node in nodes_of(path):
            if isinstance(node, ast.Call):
                yield f"{name_of(path)}:{node.lineno}", ast.unparse(node.func)


def test_no_handler_catches_everything():
    broad = []
    for path in MODULES:
        for node in nodes_of(path):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                # tidies up, or says it otherwise; hides nothing
                last = node.body[-1]
                passed_on = isinstance(last, ast.Raise) and (last.exc is None or last.cause is not None)
                if not passed_on and (node.type is None or re.search(r"\b(Base)?Exception\b", caught)):
                    broad.append(f"{name_of(path)}:{node.lineno}: except {caught}")
    assert not broad


# A checkpoint's manifest is no file of the run folder.
NAMED_ELSEWHERE = {("pipeline/storage/checkpoints.py", "manifest.json")}


# Private members of other packages that files use for want of a public way, and RLlib's, all in one file; to be cut,
# never added to. A subclass uses what it inherits, by ``self``.
PRIVATE = {
    "latent_control/base_lm.py": {"_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"},
    "latent_control/linear.py": {"_linear_pointwise"},
    "learners/sharding.py": {"_get_fsdp_state", "_lazy_init"},
    "pipeline/cluster/submit.py": {"_do_request"},
    "pipeline/rl/rllib_private.py": {
        "_env_creator",
        "_make_worker",
        "_remote_args",
        "_remote_config_obj_ref",
        "_worker_manager",
    },
    "rollout_workers/engines/vllm_model.py": {"_cpu_skip_gemm_dispatch"},
    "rollout_workers/environments/java.py": {"_gateway"},
}
PUBLIC_ALL_THE_SAME = {"_replace", "_asdict", "_fields", "_exit", "_getframe"}
"""Of named tuples, of ``os`` and ``sys``: documented."""


def own_names(tree: ast.Module) -> set[str]:
    """Functions, classes, attributes of ``self`` and fields that a module defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found


def private_of_others(tree: ast.Module) -> set[str]:
    """Private names that a module takes from another, or from an object whose class it does not hold."""
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()")
    } - own_names(tree)
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {name for name in found if re.match("_[^_]", name)} - PUBLIC_ALL_THE_SAME


def found_in(search: Callable[[ast.Module], set[str]]) -> dict[str, set[str]]:
    """File -> what ``search`` finds in it, where it finds something."""
    found = {name_of(path): search(tree_of(path)) for path in MODULES}
    return {name: names for name, names in found.items() if names}


def test_what_is_private_stays_in_its_module():
    assert found_in(private_of_others) == PRIVATE


# Attributes that files set on objects of other classes: of torch's and other libraries' objects, which have no other
# way, and of records of ours; to be cut, never added to.
SET_FROM_OUTSIDE = {
    "configs/yaml_text.py": {"yaml_implicit_resolvers"},
    "latent_control/auto.py": {"generation_config", "name_or_path"},
    "latent_control/base_lm.py": {"_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"},
    "latent_control/bases/adapters.py": {"inference_mode", "init_lora_weights"},
    "latent_control/bases/smollm2.py": {"quantization_config"},
    "latent_control/decoder_stack.py": {
        "layer_idx",
        "num_hidden_layers",
        "pad_token_id",
        "per_layer_config",
        "vocab_size",
    },
    "latent_control/decoding/slot_engine.py": {"end", "rows", "start"},
    "latent_control/decoding/lean_blocks.py": {"data"},
    "latent_control/decoding/prefill.py": {"computed", "logits", "reused", "stack_cache"},
    "latent_control/decoding/prefix_tree.py": {"end", "parent", "used"},
    "latent_control/decoding/slot_memory.py": {"data"},
    "latent_control/decoding/static_engine.py": {"end", "start"},
    "latent_control/model.py": {"data"},
    "latent_control/preference.py": {"pad_token", "pad_token_id"},
    "latent_control/pretrained.py": {"base_source"},
    "latent_control/search/decoder.py": {
        "end",
        "final",
        "held",
        "logits",
        "numbers",
        "positions",
        "rows",
        "seen",
        "start",
        "state",
        "uniforms",
    },
    "latent_control/search/tree.py": {"draws", "pending", "total", "visits"},
    "latent_control/text.py": {"eos_token_id"},
    "latent_control/token_policy.py": {"head"},
    "learners/base_training.py": {"post_processor", "pre_tokenizer"},
    "pipeline/cli/main.py": {"excepthook"},
    "pipeline/cli/panels.py": {"rich_help_panel"},
    "pipeline/console/displays.py": {"file"},
    "pipeline/rl/config.py": {"broadcast_env_runner_states", "env_config", "merge_env_runner_states"},
    "pipeline/rl/learner_timeout.py": {"daemon"},
    "pipeline/runs/metrics_log.py": {"at"},
    "pipeline/runs/interrupts.py": {
        "asked",
        "daemon",
        "handled",
        "last_words",
        "listening",
        "nothing_to_save",
        "replaced",
        "timed",
        "whole_program",
    },
    "rollout_workers/engines/vllm.py": {"choose", "environ", "job"},
    "latent_control/policies/bank.py": {"atexit", "plan"},
    "rollout_workers/engines/vllm_model.py": {"_cpu_skip_gemm_dispatch"},
    "rollout_workers/environments/java.py": {"close", "server"},
    "rollout_workers/episode_player.py": {"end", "lost"},
    "rollout_workers/judging/function.py": {"met", "stderr", "stdout"},
    "rollout_workers/judging/gym.py": {"refused"},
    "rollout_workers/judging/maths.py": {"refused"},
    "rollout_workers/judging/zygote.py": {"deadline", "dont_write_bytecode", "unread"},
    "rollout_workers/model_host.py": {"policy"},
}


def set_from_outside(tree: ast.Module) -> set[str]:
    """Names of attributes that are set on anything but ``self`` and ``cls``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and ast.unparse(node.value) not in ("self", "cls")
    }


def test_an_object_sets_its_attributes_itself():
    assert found_in(set_from_outside) == SET_FROM_OUTSIDE


def test_the_tests_of_members_fail_where_a_rule_is_broken():
    tree = ast.parse(
        "from a import _helper, shown\n"
        "class Own:\n"
        "    def _mine(self):\n"
        "        self._kept = self.group._workers\n"
        "        self.group.size, self.name = 3, other.named._kept\n"
        "        other.count += own._mine() + row._asdict()[other.__class__]\n"
        "        del other.gone\n"
    )
    assert private_of_others(tree) == {"_helper", "_workers"}
    assert set_from_outside(tree) == {"size", "count", "gone"}


def test_names_of_run_files_are_literals_in_the_layout_alone():
    """Files as whole strings; folders, which are also words, where a path is joined."""
    names = {value for name, value in vars(layout).items() if name.isupper()}
    files = {name for name in names if "." in name}
    folders = names - files
    found = set()
    for path in MODULES:
        for node in nodes_of(path):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
                found |= {(name_of(path), node.right.value)} if node.right.value in folders else set()
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                inside = node.value.startswith(tuple(f"{folder}/" for folder in folders)) and " " not in node.value
                found |= {(name_of(path), node.value)} if node.value in files or inside else set()
    assert {one for one in found if one[0] != "pipeline/runs/layout.py"} == NAMED_ELSEWHERE


# Files that use a stage's name for what is called alike: a section of the config, a variant of the evaluation, a
# command, RLlib's key of our metrics. "base" and "actions" also name a level and a column, and are not looked for.
NAMED_LIKE_A_STAGE = {
    "pipeline/bank/tasks.py": {"clone", "finetune", "improve_offline"},
    "pipeline/cli/panels.py": {"evaluate"},
    "pipeline/cli/runs.py": {"improve"},
    "pipeline/console/progress.py": {"evaluate"},
    "pipeline/experiments/pilot.py": {"clone", "improve"},
    "pipeline/experiments/codebook_score.py": {"improve"},
    "pipeline/experiments/tune_codes.py": {"finetune"},
    "pipeline/pages/report/examples.py": {"token_level"},
    "pipeline/preflight/init_config.py": {"clone", "improve"},
    "pipeline/rl/algorithm.py": {"improve"},
    "pipeline/stages/improve.py": {"improve"},
}


def test_names_of_stages_are_literals_in_their_table_alone():
    stages = {stage.name for stage in stage_table.STAGES} | {stage_table.EVALUATE}
    stages -= {"base", "actions"}
    found: dict[str, set[str]] = {}
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in nodes_of(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in stages:
                found.setdefault(name_of(path), set()).add(node.value)
    del found["pipeline/runs/stage_table.py"]
    assert found == NAMED_LIKE_A_STAGE


def test_functions_fit_a_screen():
    long = [
        f"{name_of(path)}:{node.lineno} {node.name} has {length} lines"
        for path in MODULES
        for node in nodes_of(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    ]
    assert not long


def test_modules_and_public_classes_say_what_they_are():
    bare = []
    for path in MODULES:
        tree = tree_of(path)
        if tree.body and ast.get_docstring(tree) is None:
            bare.append(name_of(path))
        bare += [
            f"{name_of(path)}:{node.lineno} {node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ]
    assert not bare


# Put together so that this file does not find itself.
MACHINE = re.compile(
    r"(?<![\w.$}/-])/(?:" + "|".join(["root", "opt", "work", r"home/(?!me\b|you\b|user\b)\w+"]) + r")/[\w.]"
)
HOSTS = re.compile(
    "|".join(
        [
            r"--(?:extra-)?index-" + "url",
            "find-" + "links",
            r"artifact" + r"ory\.",
            r"pkg" + r"\.dev/",
            r"files\.python" + "hosted",
        ]
    )
)


def test_no_machine_path_and_no_registry_host_in_tracked_files():
    found = []
    for path in tracked_files():
        if path.suffix in (".safetensors", ".png", ".parquet", ".ico", ".gz"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if MACHINE.search(line) or HOSTS.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:120]}")
    assert not found


def test_the_lock_pins_what_the_project_asks_for():
    import tomllib

    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    assert not [f"{name}=={version}" for name, version in pins.items() if not re.fullmatch(r"[\w.]+", version)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # vLLM has an environment of its own, with other versions of much of this.
    extras = [extra for name, extra in project["optional-dependencies"].items() if not name.startswith("vllm")]
    wanted = project["dependencies"] + [d for extra in extras for d in extra]
    canonical = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    assert not {re.split(r"[\[<>=~ ]", d)[0].lower() for d in wanted} - canonical


def test_the_page_on_the_architecture_names_what_there_is():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Glossary")[0]
    named = {name for text in re.findall(r"`([^`\n]+)`", page) for name in text.split() if "=" not in name}
    files = {name for name in named if name.endswith(".py")}
    assert len(files) > 25 and not [name for name in files if not (ROOT / name).is_file()]
    words = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in MODULES)))
    members = {name for name in named - files if re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)?", name)}
    assert len(members) > 25 and not {name for name in members if not set(name.split(".")) <= words}


def test_tests_mirror_the_packages():
    """A folder of tests is a folder of code, or one of those that stand for none."""
    besides = {"chaos", "foreign", "oracles", "support", "fixtures", "docs", "benchmarks"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [
        f"tests/{folder}"
        for folder in folders
        if folder.parts[:1] and folder.parts[0] not in besides and not (ROOT / folder).is_dir()
    ] == []
    assert [path.name for path in (ROOT / "tests").glob("test_*.py")] == ["test_architecture.py"]


BANNED = ("anew", "befell", "befits", "likewise", "became of", "all told", "crew", "bury")
"""Words that the field does not use; ``docs/lab-log.md`` keeps its own."""


def test_the_words_are_those_of_the_field():
    code = [path for package in ARROWS for path in sorted((ROOT / package).rglob("*.py"))]
    pages = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "lab-log.md"]
    found = [
        f"{path}:{number}: {word}"
        for path in (*code, *pages, ROOT / "README.md")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in BANNED
        if re.search(rf"\b{word}\b", line)
    ]
    assert found == []


# Public class names that stand twice, and functions outside the command line with more than eight parameters: to be
# cut, never added to.
DOUBLED = {"Progress"}
MANY_PARAMETERS = {
    "latent_control/analysis/trace.py:generate_traced",
    "latent_control/auto.py:generate",
    "latent_control/losses.py:clipped_surrogate",
    "learners/collate.py:__init__",
    "pipeline/data/batches.py:training_batches",
    "pipeline/replay/reader.py:__init__",
    "pipeline/tracking/results.py:keep",
}


def test_no_public_class_name_stands_twice():
    names = [
        node.name
        for package in ARROWS
        for path in (ROOT / package).rglob("*.py")
        for node in nodes_of(path)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert {name for name in names if names.count(name) > 1} == DOUBLED


def test_functions_take_eight_parameters_at_most():
    many = set()
    for package in ARROWS:
        for path in (ROOT / package).rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            for node in nodes_of(path):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not place.startswith("pipeline/cli/"):
                    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    if sum(one.arg not in ("self", "cls") for one in given) > 8:
                        many.add(f"{place}:{node.name}")
    assert many == MANY_PARAMETERS
