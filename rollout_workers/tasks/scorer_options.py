"""Options of the scorers, as ``task.options`` names them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from configs.schema import PathStr, Section

Verifier = Literal["exact", "number", "contains", "regex", "math", "python", "preference"]
NO_ANSWER = ("python", "preference")
"""Verifiers whose rows need no answer."""


class Limits(Section):
    """Of the process that judges (``regex``, ``math``, ``python``, reasoning-gym)."""

    seconds: PositiveFloat = 5.0
    """For one response; longer is the failure ``reward_timeout``."""
    megabytes: Annotated[int, Field(ge=64)] = 2048
    """Of address space; more is the failure ``reward_memory`` or ``reward_crash``."""
    parallel: PositiveInt | None = None
    """Responses judged at once by ``math`` and reasoning-gym; ``null``: as many as the worker may use CPUs."""
    allow_unconfined: bool = False
    """Run verifiers that evaluate responses where their isolation does not stand (SECURITY.md), instead of an error."""


class Python(Section):
    """A reward function of one's own, ``def reward(row, response)``."""

    path: PathStr
    """The file; in a config, relative to it."""
    function: str = "reward"
    parts: tuple[str, ...] = ()
    """Names of the further parts that it returns in its mapping."""
    success_at: float = 1.0
    """A response succeeds with at least this reward, unless the function returns ``success`` itself."""
    network: bool = False
    """It may open connections, as to a judge; else trying is the failure ``reward_refused``."""
    processes: bool = False
    """It may start other processes, as tests of code do; else trying is the failure ``reward_refused``."""
    variables: tuple[str, ...] = ()
    """Names of environment variables that it may see besides ``PATH`` and the like, e.g. one with a judge's key."""


class Preference(Section):
    """A reward model: a transformers sequence classifier with one output (``latent-control reward train`` makes
    one)."""

    model: PathStr
    """Its folder, or hub id."""
    success_at: float = 0.0
    """A response succeeds with at least this score."""
    squash: bool = False
    """The reward is the sigmoid of the score."""
    actors: PositiveInt = 1
    """Ray actors that host it, shared by all rollout workers."""
    cpus_per_actor: NonNegativeFloat = 1.0
    gpus_per_actor: NonNegativeFloat = 0.0
    batch_size: PositiveInt = 32
    """Texts scored at once."""
    max_length: PositiveInt | None = None
    """Tokens of prompt and response, the last ones; ``null``: as it was trained, else 1024."""
    chat: bool | None = None
    """Wrap prompt and response in the model's chat template; ``null``: as it was trained, else not."""
    timeout_seconds: PositiveFloat = 600.0
    """A batch that takes longer fails."""
