"""What a config may name of the stages is what the table has."""

from __future__ import annotations

from configs.gates import VARIANTS, made_variants
from configs.schema import RunConfig
from pipeline.runs.stage_table import STAGES

WHOLE = RunConfig(
    base={"model": "m", "train": {}},
    actions={},
    clone={},
    finetune={"codes": "inverse_dynamics"},
    improve_offline={"data": [{"kind": "replay", "path": "p"}]},
    improve={"token_baseline": True},
)


def test_a_config_with_everything_has_every_stage_and_variant() -> None:
    assert all(stage.settings(WHOLE) is not None and stage.planned(WHOLE) for stage in STAGES)
    assert {stage.variant for stage in STAGES} - {None} == set(VARIANTS) - {"base"}
    assert made_variants(WHOLE) == VARIANTS


def test_stages_that_a_config_names_are_rows() -> None:
    rows = [stage.name for stage in STAGES]
    named = [name for name in WHOLE.stages if name != "evaluate"]
    assert named == [name for name in rows if name in named]
