"""Random decoding calls, every row of them against a pass over its own tokens alone (``engine_cases``)."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Case, Subjects, check, judged, random_case, run

from latent_control import Generation

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
    require_right(range(FIRST, FIRST + 120), subjects)


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
