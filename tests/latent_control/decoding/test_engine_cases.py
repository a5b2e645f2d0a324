"""Random decoding calls, every row of them against a pass over its own tokens alone (``engine_cases``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import SHAPE as SMALL
from engine_cases import Case, Subject, Subjects, check, judged, random_case, run
from transformers import AutoConfig, AutoModelForCausalLM

from latent_control import Generation, LatentActionLM

FIRST = 1_000_000
"""Another range of seeds shows other cases."""


@pytest.fixture(scope="module")
def subjects() -> Subjects:
    """Every model once."""
    return Subjects()


def require_right(seeds: range, subjects: Subjects) -> None:
    """No fault in any row of the cases, and hardly a choice that rounding could have made otherwise."""
    verdicts = [judged(random_case(seed), subjects) for seed in seeds]
    faults = [fault for verdict in verdicts for fault in verdict.faults]
    assert not faults, (
        f"{len(faults)} faults in {sum(bool(v.faults) for v in verdicts)} of {len(verdicts)} cases, the first: "
        f"{faults[:3]}"
    )
    choices = sum(verdict.choices for verdict in verdicts)
    assert choices > 40 * len(verdicts) and sum(verdict.ties for verdict in verdicts) <= choices / 10_000
    assert max(verdict.gap for verdict in verdicts) < 1e-4


def test_rows_are_what_they_would_be_alone(subjects: Subjects) -> None:
    require_right(range(FIRST, FIRST + 60), subjects)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(10))
def test_rows_are_what_they_would_be_alone_ten_thousand_times(subjects: Subjects, part: int) -> None:
    require_right(range(part * 1000, (part + 1) * 1000), subjects)


def test_more_rows_than_slots_and_lengths_that_differ(subjects: Subjects) -> None:
    """6 prompts x 8 on 16 slots, limits of 2 to 12: 16 of 48 rows had other rows' tokens in them, seldom the first."""
    settings = {
        "kind": "llama",
        "policy": "late",
        "way": "lean",
        "temperature": 1.0,
        "top_k": None,
        "aliases": None,
        "watched": False,
    }
    draw = torch.Generator().manual_seed(0)
    limits = torch.randint(2, 13, (48,), generator=draw).tolist()
    prompts = [torch.randint(3, 48, (4,), generator=draw).tolist() for _ in range(6)]
    case = Case(
        seed=0,
        prompts=prompts,
        repeats=8,
        slots=16,
        limits=limits,
        streams=list(range(48)),
        stops=[-1],
        stop_strings=[],
        keep_features=True,
        codes=None,
        allowed=None,
        barred={},
        changes=[],
        **settings,  # type: ignore[arg-type]
    )
    subject = subjects(case)
    few, whole = run(case, subject), run(case, subject, slots=48)
    assert torch.equal(few.tokens, whole.tokens) and torch.equal(few.actions, whole.actions)
    torch.testing.assert_close(few.action_logp, whole.action_logp, rtol=0, atol=1e-4)
    assert not check(case, subject, few).faults


@pytest.mark.parametrize("spoilt", ["token", "action", "logp", "length", "feature"])
def test_the_check_finds_what_is_wrong(subjects: Subjects, spoilt: str) -> None:
    """One number changed in one row is a fault of that row."""
    case = next(
        c
        for c in map(random_case, range(1000))
        if c.policy == "late" and c.keep_features and len(c.limits) > 3 and not c.codes
    )
    subject = subjects(case)
    out = run(case, subject)
    row = int(out.lengths.argmax())
    changed: dict[str, Generation] = {}
    for name in ("tokens", "actions", "action_logp"):
        column = getattr(out, name).clone()
        column[row, 1] = (column[row, 1] + 1) % 8 if name != "action_logp" else column[row, 1] - 0.01
        changed[name] = vars(out) | {name: column}  # type: ignore[assignment]
    lengths = out.lengths.clone()
    lengths[row] -= 1
    changed["length"] = vars(out) | {"lengths": lengths}  # type: ignore[assignment]
    features = tuple(f + 0.01 * (number == row) for number, f in enumerate(out.features or ()))
    changed["feature"] = vars(out) | {"features": features}  # type: ignore[assignment]
    key = {"token": "tokens", "action": "actions", "logp": "action_logp"}.get(spoilt, spoilt)
    faults = check(case, subject, Generation(**changed[key])).faults  # type: ignore[arg-type]
    assert faults and all(f"row {row}," in fault for fault in faults)


# -- bases with limits of their own ------------------------------------------------------------------------------------


def special_base(kind: str, **settings: Any) -> Subject:
    """A policy that reads the final state of a tiny random base of this kind."""
    torch.manual_seed(5)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval().requires_grad_(False)
    shape: dict[str, Any] = {"policy_layers": 1, "inverse_dynamics_layers": 1, "policy_reads": "final"}
    model = LatentActionLM.from_base(lm, num_actions=8, seed=1, **shape).eval()
    for weight, std in [(w, 0.3) for w in model.merge.parameters()] + [(model.policy.head.weight, 0.6)]:
        torch.nn.init.normal_(weight, std=std, generator=torch.Generator().manual_seed(3))
    only = {name: p.clone() for name, p in model.policy.state_dict().items()}
    return Subject(base=model.base, actor=model.actor(), versions=[only])


def case_of(prompts: list[int], limits: list[int], slots: int) -> Case:
    """Prompts of these lengths, plainly sampled."""
    draw = torch.Generator().manual_seed(0)
    return replace(
        random_case(0),
        kind="llama",
        policy="final",
        way="transformers",
        prompts=[torch.randint(3, 48, (length,), generator=draw).tolist() for length in prompts],
        repeats=1,
        slots=slots,
        limits=limits,
        streams=list(range(len(prompts))),
        stops=[-1],
        temperature=1.0,
        top_k=None,
        aliases=None,
        keep_features=False,
        codes=None,
        allowed=None,
        barred={},
        watched=False,
        changes=[],
        stop_strings=[],
        shared=False,
        decode="code",
        mixture_codes=None,
    )


NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]], "vocab_size": 48}
CTRL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "vocab_size": 48, "n_positions": 64}
PHI = SMALL | {
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 24,
    },
}
DYNAMIC = SMALL | {
    "max_position_embeddings": 24,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}


def test_masks_of_a_fixed_width_hold_rows_that_reach_the_last_position() -> None:
    """Prompts of 86, 3 and 46 tokens: columns in use outgrew the longest live row, and with it GPT-Neo's mask."""
    subject = special_base("gpt_neo", max_position_embeddings=96, bos_token_id=1, eos_token_id=2, **NEO)
    case = case_of([86, 3, 46], [10, 60, 50], slots=2)
    assert not check(case, subject, run(case, subject)).faults


def test_blocks_that_change_what_they_are_fed_leave_the_base_s_states() -> None:
    """CTRL scales its input in place."""
    subject = special_base("ctrl", **CTRL)
    case = case_of([5, 9, 3], [8, 4, 9], slots=2)
    assert not check(case, subject, run(case, subject)).faults


@pytest.mark.parametrize(("kind", "settings"), [("phi3", PHI), ("llama", DYNAMIC)], ids=["longrope", "dynamic"])
def test_rotary_positions_that_follow_the_longest_row_are_refused_where_they_would_change(
    kind: str, settings: dict[str, Any]
) -> None:
    subject = special_base(kind, **settings)
    within = case_of([5, 12, 3], [8, 12, 9], slots=2)
    assert not check(within, subject, run(within, subject)).faults
    beyond = case_of([5, 20, 3], [8, 5, 9], slots=2)
    with pytest.raises(ValueError, match=r"rows of 25 tokens, but \w+ForCausalLM has positions or scales that change"):
        run(beyond, subject)
    with pytest.raises(ValueError, match=r"rows of 30 tokens"):
        subject.base.features(torch.ones(1, 30, dtype=torch.long))
