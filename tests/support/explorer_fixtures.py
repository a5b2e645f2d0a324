"""A finished run in small, made without training: two policies on one tiny model, and rollouts of policies between
them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from explorer_data import made_up
from transformers import AutoTokenizer

from configs.loading import dump_config
from configs.schema import Actions, Clone, Improve, RunConfig
from configs.schema import RolloutConfig as Sampling
from latent_control import LatentActionLM
from latent_control.pretrained import base_path, with_policy, world_hash
from pipeline.pages.explorer.records import Dataset
from pipeline.replay.writer import ReplayWriter
from pipeline.storage import checkpoints, checksummed_jsonl
from rollout_workers.generated_row import Row, joined, row_of
from rollout_workers.rollouts import Rollout
from rollout_workers.tasks import build_task

UPDATES, PROMPTS, GROUP, LONGEST = 4, 3, 4, 6
SHARD = 24
"""Rollouts in a file: half of them."""
SAID = 3
"""Tokens that the world says after the first response of an episode."""
TOY = "environment/toy_world:Keys"


def play(
    model: LatentActionLM, prompts: list[str], version: int, *, turns: int = 1, task: str = "countdown"
) -> list[Rollout]:
    """``GROUP`` rollouts of each prompt, in turns; the reward is the share of even tokens among the generated ones."""
    tokenizer = AutoTokenizer.from_pretrained(model.base_source)
    found = []
    for place, text in enumerate(prompts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        end = tokenizer.eos_token_id
        out = model.generate(ids, max_new_tokens=LONGEST, seed=100 * version + place, repeats=GROUP, stop_token=end)
        for g in range(GROUP):
            row = row_of(out, g) if turns == 1 else _episode(model, ids, row_of(out, g), end, turns)
            own = row.generated if len(row.generated) else np.ones(len(row), bool)
            reward = float((row.tokens[own] % 2 == 0).mean())
            found.append(
                Rollout(
                    rollout_id=f"v{version}-{place}-{g}",
                    group_id=f"v{version}-{place}",
                    prompt_id=f"{task}/train/{place}",
                    prompt_text=text,
                    text=tokenizer.decode(row.tokens),
                    prompt_tokens=ids[0].numpy().astype(np.int32),
                    tokens=row.tokens,
                    actions=row.actions,
                    action_logp=row.action_logp,
                    generated=row.generated,
                    turn_rewards=np.array([0.0] * (turns - 1) + [reward] if turns > 1 else [], np.float32),
                    finish_reason=row.finish_reason,
                    reward=reward,
                    reward_parts={},
                    success=reward > 0.5,
                    failure=None,
                    policy_version=version,
                    policy_hash=str(version),
                    world_hash=world_hash(model),
                    codebook_hash="c",
                    level="latent",
                    seed=0,
                    worker=0,
                    created=0.0,
                )
            )
    return found


def _episode(model: LatentActionLM, ids: torch.Tensor, first: Row, end: int, turns: int) -> Row:
    """``first`` and what follows it, with ``SAID`` tokens of a world between the responses, joined as workers do."""
    rows, said = [first], [5] * SAID
    for turn in range(1, turns):
        ids = torch.cat([ids, torch.tensor([[*rows[-1].tokens.tolist(), *said]])], 1)
        rows.append(row_of(model.generate(ids, max_new_tokens=LONGEST, seed=turn, stop_token=end), 0))
    return joined(rows, [said] * (turns - 1), "terminated")


def _means(played: list[Rollout]) -> dict[str, float]:
    """As the run logs them."""
    judged = [rollout for rollout in played if rollout.reward is not None]
    return {name: float(np.mean([getattr(rollout, name) for rollout in judged])) for name in ("reward", "success")}


def make_run(folder: Path, checkpoint: Path, *, turns: int = 1) -> Path:
    """``folder`` as a run leaves it behind; with more ``turns``, of a text world."""
    name = "countdown" if turns == 1 else TOY
    config = RunConfig(
        task={"name": name},
        base={"model": base_path(checkpoint)},
        actions=Actions(num_actions=8, updates=0),
        clone=Clone(updates=0),
        improve=Improve(updates=UPDATES),
        rollout=Sampling(max_new_tokens=LONGEST),
        tracking={"enabled": False},
        explorer={"seconds": 1.0},
        cluster={"learner_threads": 1},
    )
    (folder / "stages").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    model = LatentActionLM.from_pretrained(checkpoint)
    clone, improve = (folder / "checkpoints" / stage for stage in ("clone", "improve"))
    checkpoints.write(clone, files=model.save_pretrained, info={})
    first = {name: tensor.detach().numpy().copy() for name, tensor in model.policy.state_dict().items()}
    rng = np.random.default_rng(0)
    step = {name: np.zeros_like(array) for name, array in first.items()}
    step["head.weight"] = rng.normal(0, 0.3, step["head.weight"].shape).astype(np.float32)
    task, writer = build_task(config.task), ReplayWriter(folder / "replay", SHARD, f"{folder.name}-improve")
    prompts = [task.prompts("train")[i].text for i in range(PROMPTS)]
    log = []
    for version in range(UPDATES):
        model.policy.load_state_dict({n: torch.from_numpy(first[n] + step[n] * version / (UPDATES - 1)) for n in first})
        played = play(model, prompts, version, turns=turns, task=name)
        writer.add(played)
        log.append({"stage": "improve", "step": version + 1} | _means(played))
    writer.close()
    (folder / "metrics.jsonl").write_text("".join(map(checksummed_jsonl.line, log)))
    last = {n: first[n] + step[n] for n in first}
    checkpoints.write(improve, files=lambda staging: with_policy(clone, staging, last), info={})
    for stage in ("clone", "improve"):
        (folder / "stages" / f"{stage}.json").write_text(
            json.dumps({"checkpoint": f"checkpoints/{stage}", "seconds": 1.0, "metrics": {}})
        )
    return folder


@pytest.fixture(scope="session")
def explored_run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A finished run; do not change it."""
    return make_run(tmp_path_factory.mktemp("runs") / "small", tiny_checkpoint)


@pytest.fixture(scope="session")
def episodes_run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A finished run of an agent, whose episodes have two turns; do not change it."""
    return make_run(tmp_path_factory.mktemp("runs") / "agent", tiny_checkpoint, turns=2)


@pytest.fixture(scope="session")
def large_dataset() -> Callable[..., Dataset]:
    """``large_dataset(codes=64, rollouts=2000, tokens=24)``; see ``made_up``."""
    return made_up
