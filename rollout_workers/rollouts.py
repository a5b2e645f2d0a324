"""The records that travel between driver, rollout workers, learner and replay buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from configs.schema import Decode
from latent_control.token_policy import Trains

Level = Literal["latent", "token", "base"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSpec:
    """Which model a worker hosts.

    ``HostSpec(level="latent", checkpoint="runs/a/checkpoints/clone")``
    """

    level: Level
    checkpoint: str
    """A latent-action checkpoint (level "latent"), else the base LM's folder or hub id."""
    token_trains: Trains = "last_blocks"
    """What the policy of level "token" is; low-rank adapters are merged, so "last_blocks"."""
    token_blocks: int = 0
    """How many blocks that is, except for "all"."""
    policy_file: str | None = None
    """Trained weights of a token-level policy; ``None`` is the base as it is."""
    dtype: str = "auto"
    """Of the base LM: "auto" (as stored), "float32" or "bfloat16"."""
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyVersion:
    """One published state of the policy: what a request must be sampled with."""

    version: int
    """Learner updates done."""
    weights_hash: str
    """SHA-256 of the weights; the worker checks what it loaded against it."""
    weights: Any
    """Ray reference to ``{parameter name: numpy array}``, or that dict itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRequest:
    """One piece of work for a rollout worker.

    ``RolloutRequest(request_id=12, split="train", prompt_indices=(4, 5), seeds=(7, 7), group_size=8,
    policy=PolicyVersion(...))`` asks for 8 rollouts of training prompts 4 and 5.
    """

    request_id: int
    """Place in the driver's order; in training, of its first prompt in the run's stream of prompts."""
    split: Literal["train", "heldout"]
    prompt_indices: tuple[int, ...]
    seeds: tuple[int, ...]
    """One per prompt: rollout g of prompt p draws from its own stream, derived from (seed, p, g) alone."""
    group_size: int
    policy: PolicyVersion | None = None
    """``None`` samples with the policy as loaded."""
    host: HostSpec | None = None
    """``None`` is the worker's own."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    decode: Decode = "code"
    """"token" chooses tokens from the mixture over codes; nobody sampled a code then, so there is nothing to train
    on."""
    mixture_codes: int | None = None
    """Likeliest codes in that mixture; ``None``: all"""
    ship_features: bool = False
    aliases: int | None = None
    """Codes compared to find those that would have emitted the same token; ``None``: none."""
    greedy_baseline: bool = False
    """Also play each prompt once greedily; its reward is the ``baseline`` of the prompt's rollouts."""
    member: Any = None
    """The policy's ``MemberSettings``, for a worker of many policies."""
    board: Any = None
    """Actor handle of a ``PolicyBoard``: rollouts in flight go on with newer policies as they are published; ``None``:
    they don't."""

    def __post_init__(self) -> None:
        if self.decode == "token" and self.split == "train":
            raise ValueError(
                "decode='token' samples no codes, which training needs the log-probabilities of: sample training "
                "rollouts with decode='code'"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt with its sampled codes, tokens, log-probabilities, reward and version.

    Anything with a length that is no list or dict passes through RLlib's ``LearnerGroup`` unchanged, so a list of
    rollouts stands where RLlib has a list of episodes.
    """

    rollout_id: str
    group_id: str
    prompt_id: str
    prompt_text: str
    text: str
    prompt_tokens: np.ndarray
    """int32 [P]"""
    tokens: np.ndarray
    """int32 [T], generated, the end token included; in an episode of several turns also the observations between
    (``generated`` tells them apart)"""
    actions: np.ndarray
    """int32 [T]; 0 at observed tokens, as ``action_logp``"""
    action_logp: np.ndarray
    """float32 [T], natural logarithm, of the behaviour policy, stored at sampling time"""
    finish_reason: str
    reward: float | None
    """``None`` when the verifier failed: the rollout is masked and counted, never scored 0."""
    reward_parts: Mapping[str, float]
    """Named parts of the score, the generic ones included."""
    success: bool
    failure: str | None
    """"kind: message" of a verifier failure."""
    policy_version: int
    """The oldest that chose an action of it."""
    policy_hash: str
    world_hash: str
    codebook_hash: str
    level: str
    seed: int
    worker: int
    created: float
    """Unix time, seconds."""
    action_versions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [T], the policy version that chose each action; empty where ``policy_version`` chose all."""
    generated: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    """bool [T], False at observed tokens; empty where all tokens were generated."""
    turn_rewards: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """float32, what each turn of an episode brought, before ``reward.weights``; empty for a single response."""
    support: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [T, k], the actions that each was sampled from (``rollout.top_k``); empty where all could be"""
    reward_hash: str = ""
    """Names the definition that ``reward`` follows (task, options, weights)."""
    event_logp: np.ndarray | None = None
    """float32 [T], log-probability of the code chosen or one that emits the same token, where asked for; travels to the
    learner, not to Parquet, as do those that follow."""
    events: np.ndarray | None = None
    """uint8 [T, ceil(N / 8)], which codes those are, eight to a byte."""
    rescored_logp: np.ndarray | None = None
    """float32 [T], ``action_logp`` found again by one pass over the finished row, NaN where it cannot be; only of some
    rollouts."""
    baseline: float | None = None
    """Reward of the prompt's greedy rollout, where one was asked for and judged."""
    decode: Decode = "code"
    """As in the request: of "token" ``actions`` are the codes most responsible for the tokens, not a choice."""
    features: np.ndarray | None = None
    """[P + T - 1, D], the state the policy reads."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mask(self) -> np.ndarray:
        """bool [T], which tokens were generated."""
        return self.generated if len(self.generated) else np.ones(len(self.tokens), bool)

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated."""
        return int(self.mask.sum())

    @property
    def truncated(self) -> bool:
        """Cut, rather than ended by the policy (end token) or by the environment."""
        return self.finish_reason not in ("stop", "terminated")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSummary:
    """What the driver sees of a finished request; the rollouts themselves stay in the object store."""

    request_id: int
    worker: int
    policies: tuple[tuple[int, str, int], ...]
    """(policy version, hash of its weights, actions it chose) for each that had a part, oldest first."""
    rollouts: int
    tokens: int
    failures: int
    rewards: tuple[float, ...]
    successes: tuple[bool, ...]
    """Per rollout, in the request's order (prompts outer, group inner)."""
    seconds: float
    """Of the whole request."""
    verifying: float = 0.0
    """Seconds of them in the verifier."""
    part_means: Mapping[str, float] = field(default_factory=dict)
    """Mean of each part of the score over the rollouts that were judged."""
    node: str = ""
    """Ray's name of the node on which the rollouts lie."""
    rollout_ids: tuple[str, ...] = ()
    """In the request's order."""
    failure_kinds: tuple[str, ...] = ()
    """"kind: message" of verifier failures, each kind once."""
    gib: float = 0.0
    """Memory the worker's process holds."""
    prompt_tokens: tuple[int, int] = (0, 0)
    """Of all calls of the base for the request: those it computed, those it found in the prefix cache."""
    code_counts: Mapping[int, int] = field(default_factory=dict)
    """How often each code was chosen; empty at token level."""
