"""Trains a preference reward model on pairs of responses, in this process; the loss is in
``latent_control.preference``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latent_control.preference import Reading, bradley_terry, encode, forward, load_classifier, scores
from learners.learning_rate import learning_rate_share

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """``Pair(prompt="Say hello.", chosen="Hello!", rejected="No.")``"""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTraining:
    """The dials of the training."""

    updates: int = 500
    batch_size: int = 16
    """Pairs per update."""
    learning_rate: float = 1e-5
    warmup_updates: int = 10
    min_learning_rate_share: float = 0.1
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    evaluate_every: int = 50
    seed: int = 0


def train_reward_model(
    base: str, train: Sequence[Pair], heldout: Sequence[Pair], settings: RewardTraining, reading: Reading, log: Log
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """A classifier trained on ``train``, its tokenizer, and how many held-out pairs it puts in the right order.

    ``log(update, metrics)`` gets ``loss`` (nats), ``accuracy`` and ``margin`` of each update, and ``heldout_accuracy``
    now and then.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # the new head
        classifier, tokenizer = load_classifier(base, new_head=True)
        classifier.to("cuda" if torch.cuda.is_available() else "cpu").train()
        encoded = [
            (encode(tokenizer, p.prompt, p.chosen, reading), encode(tokenizer, p.prompt, p.rejected, reading))
            for p in train
        ]
        optimizer = torch.optim.AdamW(
            classifier.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: learning_rate_share(settings, update))
        for update in range(settings.updates):
            batch = _draw(encoded, settings, update)
            both = forward(classifier, [chosen for chosen, _ in batch] + [rejected for _, rejected in batch])
            loss, metrics = bradley_terry(both[: len(batch)], both[len(batch) :])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), settings.gradient_clip)
            optimizer.step()
            schedule.step()
            metrics["loss"] = loss.item()
            if (update + 1) % settings.evaluate_every == 0:
                metrics["heldout_accuracy"] = right(classifier, tokenizer, heldout, settings.batch_size, reading) / len(
                    heldout
                )
            log(update + 1, metrics)
    return classifier, tokenizer, right(classifier, tokenizer, heldout, settings.batch_size, reading)


def right(
    classifier: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    batch_size: int,
    reading: Reading,
) -> int:
    """How many pairs have the higher score at the chosen response."""
    training = classifier.training
    classifier.eval()
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    found = scores(classifier, [encode(tokenizer, prompt, text, reading) for prompt, text in texts], 2 * batch_size)
    classifier.train(training)
    return sum(chosen > rejected for chosen, rejected in zip(found[::2], found[1::2], strict=True))


def _draw(
    encoded: Sequence[tuple[list[int], list[int]]], settings: RewardTraining, update: int
) -> list[tuple[list[int], list[int]]]:
    """The pairs of an update: passes over all of them, each in an order of its own."""
    places = range(update * settings.batch_size, (update + 1) * settings.batch_size)
    return [
        encoded[_order(len(encoded), settings.seed, place // len(encoded))[place % len(encoded)]] for place in places
    ]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, passes: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{passes}").shuffle(order)
    return order
