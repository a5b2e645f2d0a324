"""vLLM as the engine: paged caches and its own scheduler, for Llama-shaped bases at the latent level
(``docs/vllm.md``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt, ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from configs.schema import RolloutConfig as RolloutSettings
from configs.schema import Section
from latent_control.bases.loading import BASE, load_config, require_whole
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.stop_strings import stopped_length
from latent_control.distributions import action_log_probs, likeliest, sample_actions, uniform_streams
from latent_control.policies.latent import LatentPolicy
from latent_control.pretrained import WEIGHTS, base_path, read_shape, weights_hash
from latent_control.records import Generation
from latent_control.text import end_tokens, load_tokenizer
from rollout_workers.engines.protocol import DecodeJob
from rollout_workers.rollouts import HostSpec

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


class VllmOptions(Section):
    """``rollout.engine_options``, e.g. ``{gpu_memory_utilization: 0.8}``."""

    max_model_len: PositiveInt | None = None
    """Tokens of prompt and response together; ``None``: the base LM's own."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU that weights and caches may take."""
    cpu_cache_gb: PositiveInt = 1
    """Key-value cache on a machine without GPU."""


def read_options(settings: RolloutSettings) -> VllmOptions:
    """The options of ``settings``.

    Raises:
        ValueError: one is unknown or out of range.
    """
    try:
        return VllmOptions.model_validate(settings.engine_options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["rollout.engine_options", *map(str, first["loc"])])
        raise ValueError(f"{place}: {first['msg']}; engine vllm takes {', '.join(VllmOptions.model_fields)}") from error


class Chooser:
    """Picks a step's codes, each row from its own random stream, and keeps what was picked.

    vLLM orders a step's rows as it likes; its runner knows whose they are. A row in the middle of its prompt is chosen
    for too, and the choice for the same place comes again later, so the last one counts.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.job: DecodeJob | None = None

    def begin(self, job: DecodeJob) -> None:
        """Empty records [B, T] for a job."""
        self.job, shape = job, (len(job.seeds), job.max_new_tokens)
        self.uniforms = uniform_streams(job.seeds, job.max_new_tokens)
        self.actions = torch.full(shape, -1, dtype=torch.long)
        self.logp = torch.zeros(shape)
        self.support: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Codes [M] of policy logits [M, N]."""
        if self.job is None:  # vLLM tries its memory out
            return logits.argmax(-1)
        states = [self.runner.requests[name] for name in self.runner.input_batch.req_ids[: len(logits)]]
        rows = torch.tensor([state.sampling_params.extra_args["row"] for state in states])
        steps = torch.tensor([len(state.output_token_ids) for state in states])
        support = likeliest(logits, self.job.top_k)
        log_probs = action_log_probs(logits, temperature=self.job.temperature, support=support)
        uniforms = self.uniforms[rows, steps].to(logits.device)
        actions = logits.argmax(-1) if self.job.temperature == 0 else sample_actions(log_probs, uniforms)
        if support is not None:
            if self.support is None:
                self.support = torch.zeros(*self.actions.shape, support.shape[-1], dtype=torch.long)
            self.support[rows, steps] = support.cpu()
        self.actions[rows, steps] = actions.cpu()
        self.logp[rows, steps] = log_probs.gather(-1, actions[:, None])[:, 0].cpu()
        return actions


class VllmEngine:
    """One vLLM engine in this process. Rollouts are the built-in engine's, as far as its kernels compute the same
    numbers."""

    ships_features = False
    tree: PrefixTree | None = None
    level = "latent"

    def __init__(
        self,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        world_hash: str,
        codebook_hash: str,
        stop: Sequence[str] = (),
    ) -> None:
        self.llm, self.tokenizer, self.stop = llm, tokenizer, stop
        self.world_hash, self.codebook_hash = world_hash, codebook_hash
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.model, self.chooser = runner.model, Chooser(runner)
        self.model.choose = self.chooser

    @classmethod
    def load(
        cls, spec: HostSpec, settings: RolloutSettings, *, device: torch.device, policy_dtype: torch.dtype
    ) -> VllmEngine:
        """Host the model of ``spec``; the policy runs in the base's dtype, whatever ``policy_dtype`` is.

        Raises:
            ValueError: wrong options, no such checkpoint, or a base LM that is no Llama or not whole.
            ModuleNotFoundError: vLLM is not installed here.
        """
        options = read_options(settings)
        if find_spec("vllm") is None:
            raise ModuleNotFoundError(
                "rollout.engine: vllm, but vLLM is not installed in this environment: see docs/vllm.md, or set local"
            )
        base = base_path(spec.checkpoint)
        config = load_config(base, trust_remote_code=spec.trust_remote_code)
        architecture = (config.architectures or ["none"])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"engine vllm hosts {' and '.join(ARCHITECTURES)}, but {base} is {architecture}: set "
                "rollout.engine: local"
            )
        shape = read_shape(Path(spec.checkpoint))
        if shape.span > 1:
            raise ValueError(
                f"engine vllm chooses a code for every token, those of {spec.checkpoint} last for {shape.span}: set "
                "rollout.engine: local"
            )
        if shape.policy_state == "both":
            raise ValueError(
                f"engine vllm gives an mlp the base's final state alone, that of {spec.checkpoint} reads both: set "
                "rollout.engine: local"
            )
        require_whole(base, BASE, trust_remote_code=spec.trust_remote_code)
        tensors = load_file(Path(spec.checkpoint) / WEIGHTS)
        world = [(name, tensor) for name, tensor in tensors.items() if name.startswith(("codebook", "merge"))]
        return cls(
            # vLLM's own "auto" would make float32 models half as precise.
            _start(
                spec,
                base,
                config.dtype or "float32" if spec.dtype == "auto" else spec.dtype,
                settings.batch_size,
                options,
            ),
            load_tokenizer(base, trust_remote_code=spec.trust_remote_code),
            world_hash=weights_hash(world),
            codebook_hash=weights_hash([("codebook", tensors["codebook"])]),
            stop=settings.stop,
        )

    def use(self, policy: LatentPolicy) -> None:
        """Copy the weights; what vLLM has cached of prompts was made by the old ones, unless policies have no cache."""
        from rollout_workers.engines.vllm_model import load_policy

        load_policy(self.model.policy, policy.state_dict())
        if not policy.stateless:
            self.llm.reset_prefix_cache()

    def generate(self, job: DecodeJob) -> Generation:
        """Decode the job. ``keep_features`` and ``refresh`` are not possible here."""
        return self.decode(job, [job.max_new_tokens] * len(job.seeds))

    def decode(self, job: DecodeJob, limits: Sequence[int]) -> Generation:
        """``generate`` with a limit of new tokens per row, each at most ``job.max_new_tokens``."""
        from vllm import SamplingParams

        assert not job.keep_features and job.refresh is None and job.decode == "code", (
            "engine vllm neither ships features nor follows policies in flight nor decodes by token"
        )
        self.chooser.begin(job)
        fixed = {
            "temperature": 0.0,
            "stop_token_ids": list(end_tokens(self.tokenizer)),
            "ignore_eos": True,
            "detokenize": bool(self.stop),
            "stop": list(self.stop),
            "skip_special_tokens": False,
        }
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in job.prompts for _ in range(job.repeats)]
        settings = [
            SamplingParams(max_tokens=limit, extra_args={"row": row}, **fixed) for row, limit in enumerate(limits)
        ]
        answers = [output.outputs[0] for output in self.llm.generate(prompts, settings, use_tqdm=False)]
        self.chooser.job = None
        # vLLM's own text may hold a string a token later: what it waits for is a whole character.
        kept = [stopped_length(self.tokenizer, self.stop, answer.token_ids) for answer in answers]
        lengths = torch.tensor([n or len(answer.token_ids) for n, answer in zip(kept, answers, strict=True)])
        live = torch.arange(job.max_new_tokens) < lengths[:, None]
        tokens = torch.full(live.shape, self.tokenizer.pad_token_id or 0)
        rows = zip(answers, lengths.tolist(), strict=True)
        tokens[live] = torch.tensor([token for answer, length in rows for token in answer.token_ids[:length]])
        return Generation(
            tokens=tokens,
            actions=self.chooser.actions.where(live, torch.tensor(-1)),
            action_logp=self.chooser.logp * live,
            lengths=lengths,
            finish_reasons=tuple("stop" if n else one.finish_reason for n, one in zip(kept, answers, strict=True)),
            versions=torch.where(live, 0, -1),
            support=self.chooser.support,
        )

    def rescore(self, *_: object, **__: object) -> None:
        """Not here: the learner, which recomputes features from the tokens, does it in sync mode."""


def _start(spec: HostSpec, base: str, dtype: str | torch.dtype, rows: int, options: VllmOptions) -> Any:
    """A vLLM engine on the base LM's folder, in this process, where its runner can be reached."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(options.cpu_cache_gb),
    }
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # as many threads as the worker was given
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, ModelRegistry

    ModelRegistry.register_model("LatentLlama", "rollout_workers.engines.vllm_model:LatentLlama")
    return LLM(
        model=base,
        dtype=dtype,
        trust_remote_code=spec.trust_remote_code,
        hf_overrides={"architectures": ["LatentLlama"], "latent_checkpoint": str(spec.checkpoint)},
        max_model_len=options.max_model_len,
        max_num_seqs=rows,
        gpu_memory_utilization=options.gpu_memory_utilization,
        enforce_eager=True,
        async_scheduling=False,
        disable_log_stats=True,
        seed=0,
    )
