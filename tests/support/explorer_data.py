"""A made-up dataset of the explorer's page: of any size, with hostile texts in every place that shows one."""

from __future__ import annotations

import numpy as np

from pipeline.pages.explorer.records import (
    Code,
    Collapse,
    Context,
    Dataset,
    Ending,
    ExplainedChoice,
    IntervalEstimate,
    Label,
    Near,
    NGram,
    Option,
    Shift,
    Shown,
    Split,
    Summary,
    UsageOverTraining,
    Why,
)

HOSTILE = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">&lt;\u202e{{DATA}}'
"""What must stay text; the last character but some turns the direction of writing."""
DECISIVE = 2
"""The place at which another choice ends with another reward."""
WORDS = (
    HOSTILE,
    "\n",
    "",
    "\x00\x07",
    "\u202eevil",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f4bb",
    "\ud800",
    "\"'`&quot;",
    "\u2028]]><!--",
)


def made_up(
    codes: int = 64, rollouts: int = 2000, tokens: int = 24, run: str = "large", explained: int = 24, turns: int = 1
) -> Dataset:
    """Random numbers in every view, hostile texts among the words; with more ``turns``, as of an agent."""
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
            health="active",
            acts=0.5,
            labels=(
                Label(kind="writes", value=0, here=0.9, elsewhere=0.1, z=12.0),
                Label(kind="position", value=3, here=0.5, elsewhere=0.1, z=6.0),
            ),
            near=(Near(code=(k + 1) % codes, agreement=0.9, more=((1, 0.2),), less=((0, 0.1),)),),
            advantage=0.01,
            before=1 / codes,
            after=(k + 1) / codes**2,
            gain=IntervalEstimate(mean=0.01 * (k - 5), low=0.01 * (k - 6), high=0.01 * (k - 4)) if turns == 1 else None,
            strength=0.5,
            shifts=tuple(Shift(token=t, probability=0.5, mixture=0.1, log_shift=1.6) for t in some(9, words)),
            anywhere=((1, 0.4),),
            better=gram,
            worse=gram,
            contexts=tuple(
                Context(before=some(3, words), token=t, count=5, share=0.5, rollout=t)
                for t in some(6, min(words, rollouts))
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
            codes=some(tokens, codes) if turns == 1 else (*some(4, codes), *[-1] * (tokens - 6), *some(2, codes)),
            chances=some(tokens, 100),
            before=some(tokens, 100),
            after=some(tokens, 100),
            turn_rewards=() if turns == 1 else (0.25, 0.75),
        )

    def step(position: int) -> ExplainedChoice:
        options = tuple(
            Option(code=c, before=0.1, after=0.2, token=t, certainty=0.9)
            for c, t in zip(some(8, codes), some(8, words), strict=True)
        )
        rewards = (0.5, 1.0 if position == DECISIVE else 0.5, 0.5, 0.5)
        played = zip(some(4, codes), rewards, strict=True)
        endings = tuple(Ending(code=c, tokens=some(tokens, words), reward=r, success=r == 1) for c, r in played)
        endings = endings if turns == 1 else ()
        return ExplainedChoice(
            position=position, options=options, masses=tuple((t, 0.2, 0.3, 2) for t in some(6, words)), endings=endings
        )

    places = tuple(map(str, range(24)))
    split = Split(
        name="position",
        keys=places,
        counts=(9,) * 24,
        usage=table(24),
        before=table(24),
        after=table(24),
        gain=table(24, 0.1) if turns == 1 else (),
    )
    half = tuple(rng.random(50).tolist())
    training = UsageOverTraining(
        updates=tuple(map(str, range(50))), usage=table(50), perplexity=half, reward=half, success=half
    )
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
        gain=IntervalEstimate(mean=0.4, low=0.3, high=0.5) if turns == 1 else None,
        turns=turns,
        measured=IntervalEstimate(mean=0.45, low=0.4, high=0.5) if turns == 1 else None,
        measured_prompts=256,
        collapse=Collapse(
            marginal=(50.0, 40.0),
            state=(9.0, 3.0),
            strength=0.8,
            active=codes,
            probed=codes,
            acting=codes // 2,
            distinct=codes // 4,
            verdict="no collapse",
            reasons=(),
        ),
        notes=(HOSTILE,),
    )
    return Dataset(
        summary=summary,
        vocabulary=(*WORDS, *(f"word{i}" for i in range(len(WORDS), words))),
        codes=tuple(map(code, range(codes))),
        prompts=tuple(f"{HOSTILE} prompt {i}" for i in range(-(-rollouts // 8))),
        training=training,
        splits=(split, split),
        rollouts=tuple(map(shown, range(rollouts))),
        why=tuple(
            Why(rollout=r, steps=tuple(map(step, range(tokens) if turns == 1 else range(4))))
            for r in range(min(explained, rollouts))
        ),
        similar=tuple((k % 8, 0.5) for k in range(codes)),
    )
