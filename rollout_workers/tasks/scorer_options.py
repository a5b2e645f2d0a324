"""Options of the scorers, as ``task.options`` names them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from configs.schema import PathStr, Section, Share

Verifier = Literal["exact", "number", "contains", "regex", "math", "python", "preference", "judge"]
NO_ANSWER = ("python", "preference", "judge")
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


class Judge(Section):
    """A language model that judges, behind an OpenAI endpoint (docs/judges.md)."""

    base_url: Annotated[str, Field(pattern=r"^https?://")]
    """The endpoint, e.g. ``http://127.0.0.1:8000/v1``."""
    model: str
    """Its name there."""
    kind: Literal["rubric", "pairwise"] = "rubric"
    """``rubric``: a score; ``pairwise``: against the row's answer, in both orders."""
    rubric: str = "Is the answer right, complete and to the point?"
    """What counts, in words."""
    template: str | None = None
    """What it is asked, with ``{prompt}``, ``{answer}``, ``{rubric}``, ``{best}`` and ``{response}`` (``pairwise``:
    ``{first}``, ``{second}``); ``null``: ours."""
    best: PositiveInt = 10
    """The highest score of ``rubric``; the reward is the score's share of it."""
    votes: PositiveInt = 1
    """Verdicts on one response (``pairwise``: in each order), of different seeds; ``temperature`` lets them differ."""
    temperature: NonNegativeFloat = 0.0
    max_tokens: PositiveInt = 64
    """Of its reply."""
    structured: bool = True
    """Bind its reply to a JSON schema (``response_format``); ``false`` for endpoints without."""
    success_at: Share = 0.5
    """A response succeeds with at least this reward."""
    heldout_verifier: Literal["exact", "number", "contains"] | None = None
    """Says what a success is in the judge's place, and is never rewarded; ``null``: the judge does."""
    budget: PositiveInt | None = None
    """Requests at most, over all workers and starts that share ``cache``; one more is the failure ``judge_budget``."""
    cache: PathStr | None = None
    """A SQLite file with its answers by the hash of what was asked, made where there is none; ``null``: each worker's
    memory."""
    key_variable: str | None = None
    """Name of the environment variable with its API key."""
    retries: NonNegativeInt = 4
    """After connection errors, 408, 409, 429 and 5xx, with exponential back-off."""
    seconds: PositiveFloat = 60.0
    """For one reply."""
    parallel: PositiveInt = 8
    """Requests at once of each worker."""
    longest: PositiveInt = 8000
    """Characters of a response that it is shown."""
