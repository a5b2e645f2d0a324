"""What README and docs say can be typed, and what stands in for the words that a reader replaces.

``written()`` finds every ``latent-control`` line: in a bash block, after ``$ `` or at the start of a line of any other
block, in backticks. ``typed()`` makes of each the words that a test can run: capitals become stand-ins (``STAND_INS``),
what takes minutes is made smaller (``SMALLER``), and lines that come to the same are one.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAM = "latent-control"
GROUPS = ("bank", "config", "reward", "task")
PLACEHOLDER = re.compile(r"^[A-Z][A-Z0-9_|.-]*$")
TEXT_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

TINY = [
    "actions.updates=2",
    "clone.updates=2",
    "actions.evaluation_sequences=8",
    "clone.evaluation_sequences=8",
    "actions.min_alive_share=0",
]
TINY += [
    "improve.updates=2",
    "improve.prompts_per_update=4",
    "improve.group_size=2",
    "evaluation.prompts=8",
    "explorer.seconds=0",
]
TINY += ["evaluation.marginal_sequences=4", "cluster.learner_threads=1", "rollout.num_workers=1"]
TINY_OFFLINE = [
    "improve_offline.updates=2",
    "evaluation.prompts=8",
    "evaluation.marginal_sequences=4",
    "cluster.learner_threads=1",
]
TINY_AGENTS = [
    "base.train.updates=2",
    "finetune.updates=2",
    "actions.batch_size=4",
    "clone.batch_size=4",
    "finetune.batch_size=4",
]
TINY_AGENTS += [
    "base.train.batch_size=4",
    "base.train.evaluation_sequences=4",
    "finetune.evaluation_sequences=4",
    "rollout.turns.max_turns=2",
]

# The word in the docs, and what is put there; only after an option, or of a command, that is named before it.
STAND_INS = {
    "RUN": "runs/first",
    "RUN2": "runs/first",
    "RUN_DIR": "runs/first",
    "RUN_OR_CHECKPOINT": "runs/first",
    "RUN_A": "runs/A",
    "RUN_B": "runs/B",
    "CHECKPOINT": "runs/first/checkpoints/improve",
    "CONFIG": "mine.yaml",
    "DIR": "runs/new",
    "FILE": "rows.jsonl",
    "ROWS": "rows.jsonl",
    "PAIRS": "pairs.jsonl",
    "MODEL": "configs/models/countdown-1m",
    "NAME": "countdown",
    "STORE": "runs",
    "N": "2",
    "K": "2",
    "M": "2",
    "FIRST-LAST": "0-2",
    "REWARD": "0.1",
    "C": "10",
    "runs FOLDER": "runs",
    "watch FOLDER": "runs",
    "export FOLDER": "out",
    "serve FOLDER": "exported",
    "init CONFIG": "new.yaml",
    "scale RUN": "runs/going",
    "scale RUN_DIR": "runs/going",
    "scale /shared/runs/first": "runs/going",
    "resume RUN": "runs/stopped",
    "resume RUN_DIR": "runs/stopped",
    "off-policy RUN_DIR": "runs/offline",
    "off-policy RUN_OR_CHECKPOINT": "runs/first/checkpoints/clone",
    "off-policy CHECKPOINT": "runs/first/checkpoints/clone",
    "--replay RUN_DIR": "runs/first",
    "--against RUN_DIR": "runs/B",
    "section.key=value": "improve.learning_rate=1e-3",
    "key=value,value": "seed=0,1",
    "/shared/runs/first": "runs/new",
    "smollm2-135m-instruct": "configs/models/countdown-1m",
    "configs/bank/*.yaml": "configs/bank/plus.yaml",
}
"""``/shared/...`` is what a cluster's nodes share, ``smollm2-135m-instruct`` a base LM that the test machine may
lack."""

# What is added to a command, or to a command with that config, so that it takes seconds.
SMALLER = {
    "run": TINY,
    "run configs/improve_offline.yaml": TINY_OFFLINE,
    "run configs/agents_textworld.yaml": TINY + TINY_AGENTS,
    "submit": TINY,
    "job": TINY,
    "sweep": [*TINY, "--at-once", "1"],
    "init": ["--base", "configs/models/countdown-1m"],
    "sample": ["--samples", "2"],
    "tune-codes": [
        *TINY,
        *shlex.split("--num-actions 8 --span 2 --temperature '' --trials 2 --finalists 1 --rl-updates 2"),
    ],
    "pilot": ["--base", "configs/models/countdown-1m", "--minutes", "60", "--heldout", "8", "--max-new-tokens", "17"],
    "off-policy": ["--versions", "0-3"],
    "train-q": ["--updates", "3"],
    "search": ["--prompts", "2", "--iterations", "2"],
    "evaluate": ["--prompts", "8"],
    "explain": ["--seconds", "0"],
    "bank train": [
        *("--set", "improve.updates=1", "--set", "improve.prompts_per_update=2", "--set", "improve.group_size=2"),
        *("--set", "rollout.num_workers=1", "--set", "cluster.learner_threads=1"),
    ],
    "reward train": ["--updates", "2", "--batch-size", "2", "--heldout-share", "0.5"],
}

# (page, the line as it stands) -> why it cannot run here; test_docs_run.py holds that nothing else is left out.
NOT_HERE = {
    ("vllm.md", "run configs/quickstart.yaml rollout.engine=vllm rollout.engine_options={max_model_len: 128}"): (
        "vLLM has an environment of its own; tests/rollout_workers/engines/test_vllm.py runs there"
    ),
    (
        "cluster.md",
        "submit configs/llama31_8b_math.yaml --address http://HEAD:8265 --run-dir /shared/runs/first",
    ): (
        "needs Llama 3.1 8B, MATH and GPUs; `submit CONFIG --address URL --run-dir DIR` runs on a cluster of three "
        "nodes"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """``Line(page="README.md", words=("run", "CONFIG"))``: a line without the program's name."""

    page: str
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """``"run"``, ``"task check"``."""
        return " ".join(self.words[: 2 if self.words[0] in GROUPS else 1])

    @property
    def text(self) -> str:
        """As it stands."""
        return " ".join(self.words)


def blocks(text: str, mark: str = "") -> list[str]:
    """The bash blocks of a page, with ``mark`` before them."""
    return re.findall(rf"^{mark}```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def written() -> Iterator[Line]:
    """Every line of every page; a list of several names in one pair of backticks is none."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for _, block in TEXT_BLOCK.findall(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
        lines += [span for span in re.findall(r"`(latent-control [^`]+)`", text) if "," not in span.partition(" --")[0]]
        for line in lines:
            words = _words(line)
            if words and Path(words[0]).name == PROGRAM and len(words) > 1 and words[1] != "->":
                yield Line(page=page.name, words=tuple(words[1:]))


def _words(line: str) -> list[str]:
    """The words of a shell line; ``[optional]`` parts are taken, of ``[a | b]`` the first."""
    if PROGRAM not in line:
        return []
    plain = re.sub(r"\[([^][|]*) \| [^]]*\]", r"\1", line.removeprefix("$ ").split("; ")[0].split(" && ")[0])
    plain = plain.replace("\\|", "|").replace(" ...", "")
    if "'" not in plain:
        plain = re.sub(r"[\[\]]", "", plain)
    try:
        words = shlex.split(plain, comments=True)
    except ValueError:  # prose with an apostrophe
        return []
    return words[: words.index("|")] if "|" in words else words  # what another program makes of it


def typed(line: Line) -> list[tuple[str, ...]]:
    """What is run for it: words with stand-ins, one for each choice of ``a|b``."""
    name = line.command.split()
    choices = [[one] for one in name[:1]] + [one.split("|") for one in name[1:]]
    previous = name[-1]
    for word in line.words[len(name) :]:
        choices.append([_stand_in(line.command, previous, one) for one in _alternatives(word)])
        previous = word
    return list(itertools.product(*choices))


def _alternatives(word: str) -> list[str]:
    return word.split("|") if PLACEHOLDER.match(word) or re.fullmatch(r"[a-z]+(\|[a-z]+)+", word) else [word]


def _stand_in(command: str, previous: str, word: str) -> str:
    if re.fullmatch("[AB][0-9]", word):  # seeds of two sides
        return f"runs/{word[0]}"
    return next((STAND_INS[key] for key in (f"{previous} {word}", f"{command} {word}", word) if key in STAND_INS), word)


def smaller(words: tuple[str, ...]) -> list[str]:
    """``words`` with what makes them take seconds."""
    name = " ".join(words[: 2 if words[0] in GROUPS else 1])
    return [*words, *SMALLER.get(" ".join(words[:2]), SMALLER.get(name, []))]
