"""A finished run in small, made without training: two policies on one tiny model, and rollouts of policies between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from configs.loading import dump_config
from configs.schema import Actions, Clone, Improve, RunConfig
from configs.schema import Rollout as Sampling
from latent_control import LatentActionLM
from latent_control.persistence import base_path, with_policy, world_hash
from pipeline.explorer.records import (
    Code,
    Context,
    Dataset,
    Ending,
    Estimate,
    NGram,
    Option,
    Shift,
    Shown,
    Split,
    Step,
    Summary,
    Training,
    Why,
)
from pipeline.replay import ReplayWriter
from rollout_workers.episodes import Rollout
from rollout_workers.tasks.countdown import Countdown

UPDATES, PROMPTS, GROUP, LONGEST = 4, 3, 4, 6
HOSTILE = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">&lt;\u202e{{DATA}}'


def play(model: LatentActionLM, prompts: list[str], version: int) -> list[Rollout]:
    """``GROUP`` rollouts of each prompt; the reward is the share of even tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model.base_source)
    found = []
    for place, text in enumerate(prompts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = model.generate(ids, max_new_tokens=LONGEST, seed=100 * version + place, repeats=GROUP, stop_token=tokenizer.eos_token_id)
        for g in range(GROUP):
            length = int(out.lengths[g])
            tokens = out.tokens[g, :length].numpy().astype(np.int32)
            reward = float((tokens % 2 == 0).mean())
            found.append(
                Rollout(
                    rollout_id=f"v{version}-{place}-{g}",
                    group_id=f"v{version}-{place}",
                    prompt_id=f"countdown/train/{place}",
                    prompt_text=text,
                    text=tokenizer.decode(tokens),
                    prompt_tokens=ids[0].numpy().astype(np.int32),
                    tokens=tokens,
                    actions=out.actions[g, :length].numpy().astype(np.int32),
                    action_logp=out.action_logp[g, :length].numpy(),
                    finish_reason=out.finish_reasons[g],
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


def make_run(folder: Path, checkpoint: Path) -> Path:
    """``folder`` as a run leaves it behind."""
    config = RunConfig(
        base={"model": base_path(checkpoint)},
        actions=Actions(num_actions=8, updates=0),
        clone=Clone(updates=0),
        improve=Improve(updates=UPDATES),
        rollout=Sampling(max_new_tokens=LONGEST),
        tracking={"enabled": False},
        cluster={"learner_threads": 1},
    )
    (folder / "stages").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    model = LatentActionLM.from_pretrained(checkpoint)
    model.save_pretrained(folder / "checkpoints" / "clone")
    first = {name: tensor.detach().numpy().copy() for name, tensor in model.policy.state_dict().items()}
    rng = np.random.default_rng(0)
    step = {name: np.zeros_like(array) for name, array in first.items()}
    step["head.weight"] = rng.normal(0, 0.3, step["head.weight"].shape).astype(np.float32)
    task, writer = Countdown(), ReplayWriter(folder / "replay", 1000, f"{folder.name}-improve")
    prompts = [task.prompts("train")[i].text for i in range(PROMPTS)]
    for version in range(UPDATES):
        model.policy.load_state_dict({n: torch.from_numpy(first[n] + step[n] * version / (UPDATES - 1)) for n in first})
        writer.add(play(model, prompts, version))
    writer.close()
    with_policy(folder / "checkpoints" / "clone", folder / "checkpoints" / "improve", {n: first[n] + step[n] for n in first})
    for stage in ("clone", "improve"):
        (folder / "stages" / f"{stage}.json").write_text(json.dumps({"checkpoint": f"checkpoints/{stage}", "seconds": 1.0, "metrics": {}}))
    return folder


@pytest.fixture(scope="session")
def explored_run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A finished run; do not change it."""
    return make_run(tmp_path_factory.mktemp("runs") / "small", tiny_checkpoint)


@pytest.fixture(scope="session")
def large_dataset() -> Callable[..., Dataset]:
    """``large_dataset(codes=64, rollouts=2000, tokens=24)``: random numbers in every view, hostile texts among the words."""

    def make(codes: int = 64, rollouts: int = 2000, tokens: int = 24, run: str = "large") -> Dataset:
        rng = np.random.default_rng(len(run))
        words = 300

        def some(count: int, below: int) -> tuple[int, ...]:
            return tuple(rng.integers(below, size=count).tolist())

        def table(rows: int, scale: float = 1.0) -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(row) for row in (scale * rng.dirichlet(np.ones(codes), rows)).tolist())

        def code(k: int) -> Code:
            gram = tuple(NGram(codes=some(2, codes), tokens=some(2, words), high=9, low=2, z=1.5) for _ in range(4))
            return Code(
                usage=1 / codes,
                uses=100 + k,
                token_entropy=1.0,
                health="alive",
                advantage=0.01,
                before=1 / codes,
                after=(k + 1) / codes**2,
                gain=Estimate(mean=0.01 * (k - 5), low=0.01 * (k - 6), high=0.01 * (k - 4)),
                strength=0.5,
                shifts=tuple(Shift(token=t, probability=0.5, mixture=0.1, log_shift=1.6) for t in some(9, words)),
                anywhere=((1, 0.4),),
                better=gram,
                worse=gram,
                contexts=tuple(
                    Context(before=some(3, words), token=t, count=5, share=0.5, rollout=t) for t in some(6, min(words, rollouts))
                ),
            )

        def shown(i: int) -> Shown:
            reward = float(rng.random())
            return Shown(
                id=f"rollout {i} {HOSTILE}",
                prompt=i // 8,
                update=1 + i // 20,
                reward=reward,
                advantage=reward - 0.5,
                success=reward > 0.5,
                tokens=some(tokens, words),
                codes=some(tokens, codes),
                chances=some(tokens, 100),
                before=some(tokens, 100),
                after=some(tokens, 100),
            )

        def step(position: int) -> Step:
            options = tuple(
                Option(code=c, before=0.1, after=0.2, token=t, certainty=0.9) for c, t in zip(some(8, codes), some(8, words), strict=True)
            )
            endings = tuple(Ending(code=c, tokens=some(tokens, words), reward=0.5, success=False) for c in some(4, codes))
            return Step(position=position, options=options, masses=tuple((t, 0.2, 0.3, 2) for t in some(6, words)), endings=endings)

        places = tuple(map(str, range(24)))
        split = Split(
            name="position", keys=places, counts=(9,) * 24, usage=table(24), before=table(24), after=table(24), gain=table(24, 0.1)
        )
        half = tuple(rng.random(50).tolist())
        training = Training(updates=tuple(map(str, range(50))), usage=table(50), perplexity=half, reward=half, success=half)
        summary = Summary(
            run=run,
            num_actions=codes,
            span=1,
            rollouts=rollouts,
            stored=rollouts,
            choices=rollouts * tokens,
            perplexity=30.0,
            reward_first=0.2,
            reward_last=0.6,
            success_first=0.2,
            success_last=0.6,
            world=run,
            gain=Estimate(mean=0.4, low=0.3, high=0.5),
            notes=(HOSTILE,),
        )
        return Dataset(
            summary=summary,
            vocabulary=(HOSTILE, "\n", "", *(f"word{i}" for i in range(3, words))),
            codes=tuple(map(code, range(codes))),
            prompts=tuple(f"{HOSTILE} prompt {i}" for i in range(-(-rollouts // 8))),
            training=training,
            splits=(split, split),
            rollouts=tuple(map(shown, range(rollouts))),
            why=tuple(Why(rollout=r, steps=tuple(map(step, range(tokens)))) for r in range(24)),
            similar=tuple((k % 8, 0.5) for k in range(codes)),
        )

    return make
