"""How codes are found: direct assignment with the usage term against without it, against VQ-VAE; residual against
official head.

    python benchmarks/studies/codebook.py

Same base LM, demonstrations, modules, optimiser, batches and number of updates (countdown.yaml's). VQ
is that of van den Oord et al. (2017): the inverse dynamics model gives a vector, the nearest codebook vector takes its
place (straight-through), squared errors pull the two together (commitment weight 0.25); the codebook starts at vectors
of the first batch, which helps it. Measured on held-out demonstrations: cross-entropy with codes, live codes, code
perplexity, share of true next tokens that some code reaches.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from accelerate import Accelerator
from common import ROOT, row, write
from torch import nn

from configs.loading import load_config
from latent_control.analysis.measures import codebook_measures, reach_measures
from latent_control.losses import Metrics
from latent_control.model import LatentActionLM, token_nll
from latent_control.records import TokenBatch
from latent_control.text import load_tokenizer
from learners.actions import ActionsStage
from learners.offline_training import Hooks, OfflineStage, TrainingStep, make_optimizer, train
from pipeline.data.batches import heldout_batches, training_batches
from pipeline.stages.offline_work import new_model
from rollout_workers.tasks import build_task

CASES: dict[str, list[str]] = {
    "direct, usage 0.05": [],
    "direct, usage 0": ["actions.usage_weight=0"],
    "direct, usage 0.05, official head": ["actions.head=official"],
    "direct, usage 0, official head (published)": ["actions.head=official", "actions.usage_weight=0"],
    "VQ": [],
}
MEASURES = ("nll_codes", "inverse_dynamics_alive_codes", "inverse_dynamics_code_perplexity", "coverage")
COMMITMENT = 0.25


class Nearest(nn.Module):
    """Logits [..., N] = -|z - e_k|^2 of z [..., D], so that the likeliest code is the nearest."""

    def __init__(self, codebook: nn.Parameter) -> None:
        super().__init__()
        self.codebook = codebook

    @property
    def weight(self) -> torch.Tensor:
        """What ``DecoderStack`` asks for the type of."""
        return self.codebook

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return 2 * z @ self.codebook.T - (z**2).sum(-1, keepdim=True) - (self.codebook**2).sum(-1)


class VQStage(OfflineStage):
    """Stage 1a with a vector-quantised code."""

    def __init__(self, model: LatentActionLM) -> None:
        super().__init__(model)
        assert model.inverse_dynamics is not None
        model.inverse_dynamics.head = Nearest(model.codebook)  # type: ignore[assignment]
        self.started = False

    def trainable(self) -> list[nn.Parameter]:
        """Inverse dynamics model, codebook (the head of the former, too), merge module."""
        assert self.model.inverse_dynamics is not None
        return [*self.model.inverse_dynamics.decoder.parameters(), self.model.codebook, *self.model.merge.parameters()]

    def forward(self, batch: TokenBatch, step: TrainingStep) -> tuple[torch.Tensor, Metrics]:
        """Loss of one batch."""
        mask = batch.response_mask[:, 1:]
        features = self.model.features(batch.input_ids)
        assert self.model.inverse_dynamics is not None
        z = self.model.inverse_dynamics.hidden(features.read(self.model.config.inverse_dynamics_reads))[:, 1:][mask]
        if not self.started:
            chosen = torch.randperm(len(z), generator=step.generator)[: self.model.config.num_actions]
            self.model.codebook.data.copy_(z[chosen].detach())
            self.started = True
        code = self.model.codebook[self.model.inverse_dynamics.head(z.detach()).argmax(-1)]
        world = self.model.world_logits_from_codes(features.read("final")[:, :-1][mask], z + (code - z).detach())
        nll = token_nll(world, batch.input_ids[:, 1:][mask]).sum() / step.positions
        pull = ((code - z.detach()) ** 2).mean(-1).sum() + COMMITMENT * ((z - code.detach()) ** 2).mean(-1).sum()
        return nll + pull / step.positions, {"nll_sampled_codes": nll.detach()}


def found(case: str, seed: int, updates: int) -> dict[str, float]:
    """Measures of one codebook."""
    overrides = [*CASES[case], f"seed={seed}", f"actions.updates={updates}"]
    config = load_config(ROOT / "configs" / "countdown.yaml", overrides)
    assert config.actions is not None
    model = new_model(config.actions, config.base.model, config, "float32")
    stage = VQStage(model) if case == "VQ" else ActionsStage(model, config.actions)
    reading: dict[str, Any] = {
        "task": build_task(config.task),
        "tokenizer": load_tokenizer(config.base.model),
        "chat": False,
        "max_length": config.actions.max_length,
        "seed": seed,
    }
    size = config.actions.batch_size
    batches = training_batches(config.actions.data, batch_size=size, rank=0, world=1, start=0, **reading)
    held = heldout_batches(config.actions.data, batch_size=32, count=256, **reading)
    hooks = Hooks(log=lambda *_: None, evaluate=lambda _: {}, save=lambda _: None)
    train(
        stage,
        batches,
        settings=config.actions,
        accelerator=Accelerator(cpu=True),
        optimizer=make_optimizer(stage, config.actions),
        seed=seed,
        start=0,
        hooks=hooks,
    )
    measured = codebook_measures(model, held) | reach_measures(model, held)
    print(f"{case}, seed {seed}: " + ", ".join(f"{m} {measured[m]:.3f}" for m in MEASURES), file=sys.stderr, flush=True)
    return measured


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=600)
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        measured = [found(case, seed, arguments.updates) for seed in arguments.seeds]
        rows += [row(f"{case}: {measure}", [one[measure] for one in measured]) for measure in MEASURES]
    write("codebook", "benchmarks/studies/codebook.py", arguments.seeds, rows, updates=arguments.updates)


if __name__ == "__main__":
    main()
