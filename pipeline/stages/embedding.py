"""Sentence embeddings for semantic diversity: the mean of an encoder's last hidden states, with transformers alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ray
import torch

from configs.schema import RunConfig
from latent_control.bases.loading import ENCODER, load_model
from latent_control.text import load_tokenizer, padded

BATCH, LONGEST = 64, 512


def embed_texts(config: RunConfig, texts: Sequence[str]) -> np.ndarray:
    """``embed`` with ``evaluation.embedder`` in a Ray task that has the resources of a rollout worker."""
    assert config.evaluation is not None and config.evaluation.embedder is not None
    task = ray.remote(embed).options(num_cpus=config.rollout.cpus_per_worker, num_gpus=config.rollout.gpus_per_worker)
    vectors: np.ndarray = ray.get(
        task.remote(list(texts), config.evaluation.embedder, gpu=config.rollout.gpus_per_worker > 0)
    )
    return vectors


@torch.no_grad()
def embed(texts: Sequence[str], model: str, gpu: bool = False) -> np.ndarray:
    """Mean-pooled last hidden state of each text, [texts, D]; zeros for a text without tokens.

    Raises: ValueError: there is no encoder with a tokenizer at ``model``, tensors of it are missing, or it needs code
        of its own.
    """
    try:
        tokenizer = load_tokenizer(model, key=None)
        encoder = load_model(model, ENCODER, dtype=torch.float32, trust_remote_code=False, key=None).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"evaluation.embedder: no transformers model with a tokenizer at {model!r}: {error}"
        ) from error
    device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    encoder = encoder.to(device)
    vectors = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    rows = (
        tokenizer(list(texts), truncation=True, max_length=min(LONGEST, tokenizer.model_max_length))["input_ids"]
        if texts
        else []
    )
    filled = [place for place, ids in enumerate(rows) if ids]
    for start in range(0, len(filled), BATCH):
        places = filled[start : start + BATCH]
        ids, mask = padded([rows[place] for place in places], device)
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors[places] = ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu().numpy()
    return vectors
