"""The stages of a run in the order they run, one row each. What a config may name of them (``configs.gates.VARIANTS``,
``RunConfig.stages``) is held against these rows by a test."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from operator import attrgetter
from typing import Any, TypeVar

from configs.gates import VARIANTS
from configs.schema import RunConfig

BASE, ACTIONS, CLONE, FINETUNE, RECLONE = "base", "actions", "clone", "finetune", "reclone"
IMPROVE_OFFLINE, TOKEN_SFT, TOKEN_LEVEL, IMPROVE = "improve_offline", "token_sft", "token_level", "improve"
EVALUATE, PAGES = "evaluate", "pages"
T = TypeVar("T")


def _reclones(config: RunConfig) -> bool:
    return config.finetune is not None and config.finetune.codes == "inverse_dynamics" and config.clone is not None


def _runs_token_baseline(config: RunConfig) -> bool:
    return config.improve is not None and config.improve.token_baseline and config.improve.level == "latent"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row. ``Stage(name="reclone", section="clone", variant="finetuned", planned=_reclones)``"""

    name: str
    section: str
    """Dotted key of its settings in the config."""
    variant: str | None = None
    """The model of an evaluation that it makes."""
    shown: str = ""
    """In pages; empty: its name."""
    passes_on: bool = True
    """Whether the next stage starts from its checkpoint."""
    policy: bool = True
    """Whether its checkpoint has a trained policy over codes (``improve``: unless ``improve.level`` is token)."""
    online: bool = False
    """Whether it samples rollouts: reinforcement learning."""
    planned: Callable[[RunConfig], bool] = lambda config: True
    """Whether a config with its section has it."""

    def settings(self, config: RunConfig) -> Any:
        """Its section of the config; ``None`` where that is off."""
        return attrgetter(self.section)(config)


STAGES = (
    Stage(name=BASE, section="base.train", shown="base LM", passes_on=False, policy=False),
    Stage(name=ACTIONS, section="actions", policy=False),
    Stage(name=CLONE, section="clone", variant="cloned"),
    Stage(
        name=TOKEN_SFT,
        section="finetune",
        variant="token_sft",
        shown="SFT for the token level",
        passes_on=False,
        policy=False,
        planned=attrgetter("over_tokens"),
    ),
    Stage(name=FINETUNE, section="finetune", variant="finetuned"),
    Stage(name=RECLONE, section="clone", variant="finetuned", planned=_reclones),
    Stage(name=IMPROVE_OFFLINE, section="improve_offline", variant="offline", shown="offline"),
    Stage(
        name=TOKEN_LEVEL,
        section="improve",
        variant="token_level",
        shown="token level",
        passes_on=False,
        policy=False,
        online=True,
        planned=_runs_token_baseline,
    ),
    Stage(name=IMPROVE, section="improve", variant="improved", online=True),
)
"""The stages that train, in the order they run. ``token_sft`` and ``token_level`` have no codes: FTA changes the base
LM under codes, so what is compared with it at token level starts from the same updates without them."""
ONLINE = tuple(stage.name for stage in reversed(STAGES) if stage.online)
"""Stages of reinforcement learning, the method's own first."""
LATENT_STAGES = tuple(stage.name for stage in reversed(STAGES) if stage.passes_on)
"""Stages whose checkpoint has the modules of latent actions, the last one of a run first."""
POLICY_STAGES = tuple(stage.name for stage in reversed(STAGES) if stage.policy)
"""Those of them whose policy is trained, the last one of a run first."""
MAKERS = {
    variant: tuple(stage.name for stage in STAGES if stage.variant == variant)
    for variant in VARIANTS
    if variant != "base"
}
"""Stages that make each variant of an evaluation but the base LM, the last one counts; in the evaluation's order."""


def stage_of(name: str) -> Stage | None:
    """The row of a stage that trains; ``None`` for other names."""
    return next((stage for stage in STAGES if stage.name == name), None)


def settings_of(config: RunConfig, name: str) -> Any:
    """The section of the config that a stage is set by; ``None`` where it has none."""
    stage = stage_of(name)
    return None if stage is None else stage.settings(config)


def level_of(config: RunConfig, name: str) -> str:
    """What a stage of reinforcement learning chooses: "latent" (codes) or "token"; empty for other stages."""
    if config.improve is None or name not in ONLINE:
        return ""
    return "token" if name == TOKEN_LEVEL else config.improve.level


def planned(config: RunConfig, begun: Collection[str] = ()) -> list[Stage]:
    """The stages of ``config`` that train, in order. FTA-I clones the policy again.

    Args:
        begun: stages that a run has something of. A version before this trained at token level without ``token_sft``;
            such a run stays as it is.
    """
    older = TOKEN_SFT not in begun and any(level_of(config, name) == "token" for name in begun)
    stages = [stage for stage in STAGES if not (older and stage.name == TOKEN_SFT)]
    return [stage for stage in stages if stage.settings(config) is not None and stage.planned(config)]


def start_of(config: RunConfig, name: str, made: Mapping[str, T]) -> T | None:
    """What a stage starts from, of the results ``made`` by those before it, in order: at token level the base LM's own
    SFT, where there is one, else the last one that passes its result on; ``None`` where there is none."""
    if level_of(config, name) == "token" and TOKEN_SFT in made:
        return made[TOKEN_SFT]
    before = [stage.name for stage in takewhile(lambda stage: stage.name != name, STAGES) if stage.passes_on]
    return next((made[stage] for stage in reversed(before) if stage in made), None)


def behind(variant: str) -> tuple[str, ...]:
    """The stages that a variant was trained by, in order. The base LM's own training is common to all and left out."""
    last = next((stage for stage in reversed(STAGES) if stage.variant == variant), None)
    if last is None:
        return ()
    if not last.passes_on:
        return tuple(dict.fromkeys((TOKEN_SFT, last.name)))
    return tuple(stage.name for stage in STAGES[: STAGES.index(last) + 1] if stage.passes_on)


def policy_stages(config: RunConfig) -> list[str]:
    """Stages whose checkpoint can be the last policy of a run of ``config``, the last one first. FTA-I changes the base
    LM under its policy, which then is cloned again: until that is done, the policy before it is the one that fits."""
    return [name for name in POLICY_STAGES if not (name == FINETUNE and _reclones(config))]
