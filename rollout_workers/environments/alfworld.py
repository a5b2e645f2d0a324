"""ALFWorld (Shridhar et al., 2021), text mode, for those who have its data (``alfworld-download``).

The package holds none; ``tests/rollout_workers/environments/test_alfworld.py`` tries households of its form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rollout_workers.environments.java import interleaved
from rollout_workers.environments.protocol import Episode, Step
from rollout_workers.lazy_sequence import LazySequence

FOLDERS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
EPISODES = {"train": 3553, "seen": 140, "unseen": 134}


class Alfworld:
    """``alfworld/all``. Options: ``data`` the folder with ``json_2.1.1`` (else ``$ALFWORLD_DATA``); ``heldout`` folds
    in turn."""

    def __init__(self, which: str, data: str | None = None, heldout: Sequence[str] = ("seen", "unseen")) -> None:
        if not heldout or set(heldout) - {"seen", "unseen"}:
            raise ValueError(f"task.options.heldout is {list(heldout)}; name some of seen, unseen")
        self.which, self.data, self.heldout = which, data, tuple(heldout)

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """Fold and the number of a game in it."""
        folds = ("train",) if split == "train" else self.heldout
        return LazySequence(len(folds) * min(EPISODES[fold] for fold in folds), lambda i: interleaved(folds, i))

    def make(self) -> AlfworldWorld:
        """A household."""
        root = Path(self.data or os.environ.get("ALFWORLD_DATA", ""))
        if not (root / "json_2.1.1").is_dir():
            raise ValueError(
                f"task.options.data: {root} holds no json_2.1.1; run alfworld-download and name its folder"
            )
        return AlfworldWorld(root, self.which)


class AlfworldWorld:
    """One household."""

    def __init__(self, root: Path, which: str) -> None:
        self.games = {
            fold: sorted(
                str(path)
                for path in (root / "json_2.1.1" / folder).rglob("game.tw-pddl")
                if which == "all" or path.parent.parent.name.startswith(which)
            )
            for fold, folder in FOLDERS.items()
        }
        self.world: Any = None

    def reset(self, episode: Episode) -> str:
        """Begin a game."""
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredExpert, AlfredExpertType

        games = self.games[episode["fold"]]
        wanted = textworld.EnvInfos(won=True, extras=["expert_plan"])
        wrappers = [AlfredDemangler(), AlfredExpert(AlfredExpertType.HANDCODED)]
        self.world = textworld.start(games[episode["number"] % len(games)], wanted, wrappers=wrappers)
        self.state = self.world.reset()
        return str(self.state.feedback).strip()

    def step(self, text: str) -> Step:
        """Act; the reward is 1 once the task is done."""
        self.state, _, ended = self.world.step(text)
        won = bool(self.state["won"])
        return Step(
            observation=str(self.state.feedback).strip(), reward=float(won), terminated=bool(ended or won), success=won
        )

    def gold(self) -> list[str]:
        """What the expert does: it plans one action at a time, so the game is played and begun again."""
        actions: list[str] = []
        while (plan := self.state["extra.expert_plan"]) and not self.state["won"] and len(actions) < 50:
            actions.append(plan[0])
            self.state, _, _ = self.world.step(plan[0])
        solved = bool(self.state["won"])
        self.state = self.world.reset()
        return actions if solved else []
