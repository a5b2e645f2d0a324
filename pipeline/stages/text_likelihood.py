"""The part of the evaluation that reads instead of playing: NLL, KL to the base LM, retention and codebook health on
held-out text.

It runs as one Ray task with the resources of a rollout worker, after the workers are gone.
"""

from __future__ import annotations

from collections.abc import Mapping

import ray
import torch

from configs.checks import TEXT_TOKENS, row_length
from configs.schema import DataSource, RunConfig
from latent_control.analysis.likelihood import Speaker, latent_speaker, text_measures, token_speaker
from latent_control.analysis.measures import codebook_measures, reach_measures
from latent_control.base_lm import BaseLM, load_base
from latent_control.decoding.action_decoder import base_actor
from latent_control.model import LatentActionLM
from latent_control.records import TokenBatch
from latent_control.text import load_tokenizer
from latent_control.token_policy import token_actor
from pipeline.data.batches import heldout_batches
from rollout_workers.model_host import load_host
from rollout_workers.rollouts import HostSpec
from rollout_workers.tasks import build_task

BATCH = 16


def measure_texts(config: RunConfig, hosts: Mapping[str, HostSpec]) -> dict[str, dict[str, float]]:
    """``measure`` in a Ray task; ``{}`` when ``evaluation.marginal_sequences`` is 0."""
    if config.evaluation is None or not config.evaluation.marginal_sequences:
        return {}
    task = ray.remote(measure).options(num_cpus=config.rollout.cpus_per_worker, num_gpus=config.rollout.gpus_per_worker)
    found: dict[str, dict[str, float]] = ray.get(task.remote(config, dict(hosts)))
    return found


@torch.no_grad()
def measure(config: RunConfig, hosts: Mapping[str, HostSpec]) -> dict[str, dict[str, float]]:
    """What every variant says about the held-out text, by variant: the names of ``of_variant``.

    Raises:
        ValueError: there is no such text.
    """
    torch.set_num_threads(config.cluster.learner_threads)
    device = torch.device("cuda" if config.rollout.gpus_per_worker and torch.cuda.is_available() else "cpu")
    first = hosts["base"]
    batches = [batch.to(device) for batch in texts(config, first)]
    lm = BaseLM(load_base(first.checkpoint, dtype=first.dtype, trust_remote_code=first.trust_remote_code)).to(device)
    base = token_speaker(lm, base_actor(lm))
    return {name: of_variant(host, base, batches, device) for name, host in hosts.items()}


def texts(config: RunConfig, host: HostSpec) -> list[TokenBatch]:
    """The held-out text: of ``evaluation.retention``, else the task's demonstrations."""
    assert config.evaluation is not None
    stages = [section for section in (config.clone, config.actions) if section is not None]
    return heldout_batches(
        (config.evaluation.retention or DataSource(),),
        task=build_task(config.task),
        tokenizer=load_tokenizer(host.checkpoint, trust_remote_code=host.trust_remote_code),
        chat=config.task.chat,
        batch_size=BATCH,
        max_length=row_length(config, stages[0]) if stages else TEXT_TOKENS,
        seed=config.seed,
        count=config.evaluation.marginal_sequences,
    )


def of_variant(host: HostSpec, base: Speaker, batches: list[TokenBatch], device: torch.device) -> dict[str, float]:
    """One variant's measures.

    ``nll``, ``kl_to_base``: of its next-token distribution (latent: the marginal over codes; token level: the policy);
    ``nll_rise``: above the first base LM's. Latent ones also ``base_nll``, ``base_nll_rise``: of the base LM inside,
    which fine-tuning changes; and, when it is there, the health of the codes that the *inverse dynamics model* gives
    the text (RL changes nothing of it) and what the codebook reaches.
    """
    if host.level == "latent":
        model = LatentActionLM.from_pretrained(
            host.checkpoint, dtype=host.dtype, trust_remote_code=host.trust_remote_code
        ).to(device)
        return _spoken(latent_speaker(model), base, batches) | _inside(model, base, batches) | _codes(model, batches)
    if host.level == "base":
        return _spoken(base, base, batches)
    loaded = load_host(host, device, torch.float32)
    assert loaded.policy is not None
    return _spoken(token_speaker(loaded.base, token_actor(loaded.base, loaded.policy)), base, batches)


def _spoken(speaker: Speaker, base: Speaker, batches: list[TokenBatch]) -> dict[str, float]:
    found = text_measures(speaker, base, batches)
    return {"nll": found["nll"], "nll_rise": found["nll"] - found["nll_reference"], "kl_to_base": found["kl"]}


def _inside(model: LatentActionLM, base: Speaker, batches: list[TokenBatch]) -> dict[str, float]:
    """The base LM inside ``model``, beside the first one."""
    found = text_measures(token_speaker(model.base, base_actor(model.base)), base, batches)
    return {"base_nll": found["nll"], "base_nll_rise": found["nll"] - found["nll_reference"]}


def _codes(model: LatentActionLM, batches: list[TokenBatch]) -> dict[str, float]:
    if model.inverse_dynamics is None:
        return {}
    found = codebook_measures(model, batches)
    own = {name: value for name, value in found.items() if name == "nll_codes" or name.startswith("inverse_dynamics_")}
    return own | reach_measures(model, batches)
