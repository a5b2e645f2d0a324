"""Trains a small base LM on a task's demonstrations: how the embedded models were made.

A plain torch loop on one device; what it leaves out against the other offline stages: several workers, accumulation,
resuming. The loss is over response tokens only, so the model says nothing about how prompts are distributed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from configs.schema import Architecture, BaseTraining
from latent_control.bases.loading import BASE, load_model
from latent_control.tensor_files import as_readable_as
from latent_control.text import load_tokenizer
from learners.learning_rate import learning_rate_share

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
LOG_EVERY = 20
CONTEXT_TOKENS = 512
"""Positions that a model has at least; more where it is trained on longer texts."""
Log = Callable[[int, Mapping[str, float]], None]
Rows = tuple[torch.Tensor, torch.Tensor]
"""Token ids [B, T] int64, right padded, and targets [B, T] int64 with -100 outside the response."""


class _Prompt(Protocol):
    @property
    def text(self) -> str: ...


class _Demonstration(Protocol):
    @property
    def prompt(self) -> _Prompt: ...
    @property
    def response(self) -> str: ...
    @property
    def later(self) -> tuple[tuple[str, str], ...]: ...


class _Score(Protocol):
    @property
    def success(self) -> bool: ...


class WordTask(Protocol):
    """A task whose texts are words and punctuation of a small, known vocabulary."""

    @property
    def name(self) -> str: ...
    @property
    def words(self) -> Sequence[str]:
        """Every word that a prompt or response can hold."""
        ...

    def demonstrations(self, split: str, /) -> Sequence[_Demonstration]:
        """Texts to train on."""
        ...

    def score(self, prompt: Any, text: str, /) -> _Score:
        """The verdict on a response."""
        ...


def _vocabulary(words: Sequence[str]) -> dict[str, int]:
    # A word given twice must not leave an id without a word: the last ids would lie beyond the model's embedding.
    return {word: index for index, word in enumerate(dict.fromkeys((*SPECIAL, *words)))}


def word_tokenizer(words: Sequence[str], context: int = CONTEXT_TOKENS) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word or run of punctuation, which starts every text with ``<s>``."""
    vocabulary = _vocabulary(words)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # punctuation apart from words
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=context,
    )


def new_model(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model with random weights (from torch's current seed)."""
    width, layers, heads = architecture.hidden_size, architecture.num_hidden_layers, architecture.num_attention_heads
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        "initializer_range": width**-0.5,  # the default, 0.02, is made for widths of thousands: slow to start here
    }
    config: PreTrainedConfig
    if architecture.family == "gpt2":
        sizes = {"n_embd": width, "n_inner": architecture.intermediate_size, "n_layer": layers, "n_head": heads}
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(n_positions=tokenizer.model_max_length, **sizes, **drop, **shared)
    else:
        family = {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture.family]
        config = family(
            max_position_embeddings=tokenizer.model_max_length,
            num_key_value_heads=heads,
            **architecture.model_dump(exclude={"family"}),
            **shared,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _made_before(folder: str) -> PreTrainedModel:
    return load_model(folder, BASE, dtype=torch.float32, trust_remote_code=False).train()


def encode_rows(tokenizer: PreTrainedTokenizerFast, demonstrations: Sequence[_Demonstration], max_length: int) -> Rows:
    """Right-padded ids and response targets of a batch; ``ValueError`` when a prompt or response has a word the
    vocabulary lacks.

    Observations between the turns of an episode may have some: off a gold path there are more of them than can be
    listed.
    """
    rows = [_encode(tokenizer, demo, max_length) for demo in demonstrations]
    longest = max(len(row) for row, _ in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    targets = torch.full((len(rows), longest), -100)
    for i, (row, spoken) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, : len(row)] = torch.where(torch.tensor(spoken), ids[i, : len(row)], -100)
    return ids, targets


def _encode(tokenizer: PreTrainedTokenizerFast, demo: _Demonstration, max_length: int) -> tuple[list[int], list[bool]]:
    """Ids of a demonstration and which of them are responses."""
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    ids = list(tokenizer(demo.prompt.text)["input_ids"])
    spoken = [False] * len(ids)
    for observation, response in (("", demo.response), *demo.later):
        seen, said = plain(observation), plain(response)
        if tokenizer.unk_token_id in (said if demo.later else [*ids, *said]):
            raise ValueError(
                f"a word of {demo.prompt.text!r} or {response!r} is not among the task's words; add it there"
            )
        ids += [*seen, *said, tokenizer.eos_token_id]
        spoken += [False] * len(seen) + [True] * (len(said) + 1)
    return ids[:max_length], spoken[:max_length]


def response_loss(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """Mean cross-entropy per response token, in nats."""
    ids, targets = rows
    # Right padding needs no mask: under causal attention no real token sees it.
    logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


def unsuitable(config: BaseTraining, task: object, name: str) -> Iterator[str]:
    """Settings and tasks that this stage does not take."""
    if config.num_workers != 1:
        yield f"base.train.num_workers: {config.num_workers}, but the base LM is trained in one process; set 1"
    if config.microbatch_size is not None:
        yield (
            f"base.train.microbatch_size: {config.microbatch_size}, but nothing is accumulated in training a base LM; "
            "set null"
        )
    if not hasattr(task, "words"):
        yield (
            f"base.train: needs a task with a fixed vocabulary, which {name!r} has not; set task.name: countdown, or "
            "leave base.train out and name a trained model in base.model"
        )
    elif config.init is not None and load_tokenizer(config.init).get_vocab() != _vocabulary(task.words):
        yield f"base.train.init: {config.init} was trained on the words of another task than {name}; set null"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_base(config: BaseTraining, *, task: WordTask, folder: Path, seed: int, threads: int, log: Log) -> None:
    """Train a model on ``task.demonstrations("train")`` and save it with its tokenizer to ``folder``.

    Demonstrations are read in their order, so no text is seen twice before the task runs out; the first
    ``solved_updates`` skip those that do not solve their problem.
    ``log(step, metrics)`` gets ``loss`` (and ``learning_rate``) every 20 updates and ``heldout_loss`` at evaluations,
    in nats per response token. Raises ``ValueError`` for settings that this stage does not have.
    """
    if problems := list(unsuitable(config, task, task.name)):
        raise ValueError("; ".join(problems))
    with _threads(threads), torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = word_tokenizer(task.words, max(CONTEXT_TOKENS, config.max_length))
        model = new_model(config.architecture, tokenizer) if config.init is None else _made_before(config.init)
        _train(config, model, tokenizer, task, log)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    as_readable_as(folder / "config.json")


def _train(
    config: BaseTraining, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: WordTask, log: Log
) -> None:
    train, heldout = task.demonstrations("train"), task.demonstrations("heldout")
    held = encode_rows(tokenizer, list(heldout[: config.evaluation_sequences]), config.max_length)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: learning_rate_share(config, update))
    stream = (train[i % len(train)] for i in itertools.count())
    solved = (demo for demo in stream if task.score(demo.prompt, demo.response).success)
    for update in range(config.updates):
        chosen = list(itertools.islice(solved if update < config.solved_updates else stream, config.batch_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            loss = response_loss(model, encode_rows(tokenizer, chosen, config.max_length))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        rate = float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        step = update + 1
        metrics: dict[str, float] = {}
        if step % LOG_EVERY == 0 or step == config.updates:
            metrics |= {"loss": loss.item(), "learning_rate": rate}
        if step % config.evaluate_every == 0 or step == config.updates:
            metrics["heldout_loss"] = heldout_loss(model, held)
        if metrics:
            log(step, metrics)


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, rows: Rows) -> float:
    """Mean cross-entropy per response token on held-out rows, in nats."""
    model.eval()
    loss = response_loss(model, rows).item()
    model.train()
    return loss
