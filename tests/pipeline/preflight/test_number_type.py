"""``auto``: the number type that is fast here, decided once for a run and written into its config.yaml."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.loading import dump_config, load_config
from configs.schema import RunConfig
from latent_control import LatentActionLM
from pipeline.preflight import number_type
from pipeline.preflight.number_type import bfloat16_on, decided, slow_choices, with_types_of
from pipeline.run import resume, run
from pipeline.runs import manifest
from pipeline.runs.events import read_events
from pipeline.runs.layout import CONFIG

TINY = Path(__file__).resolve().parents[3] / "configs" / "models" / "countdown-1m"
NOTHING = {"evaluation": None, "tracking": {"enabled": False}, "explorer": {"enabled": False}}
QUIET = NOTHING | {"report": {"enabled": False}}
ONE = {"updates": 1, "batch_size": 2, "evaluation_sequences": 2, "min_alive_share": 0.0}


@pytest.fixture(autouse=True)
def measured_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in number_type.LIMITS:
        monkeypatch.delenv(name, raising=False)
    bfloat16_on.cache_clear()
    yield
    bfloat16_on.cache_clear()


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the issue forces it on any x86 machine."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The embedded base LM in three number types."""
    found = {"float32": str(TINY)}
    for dtype in ("bfloat16", "float16"):
        folder = tmp_path_factory.mktemp(dtype)
        AutoModelForCausalLM.from_pretrained(TINY, dtype=getattr(torch, dtype)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
        found[dtype] = str(folder)
    return found


def of(model: str, **sections: object) -> RunConfig:
    return RunConfig.model_validate({"base": {"model": model}, **QUIET, **sections})


AMX = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}
AVX2 = {"architecture": "x86_64", "avx2": True}
AVX512 = {"architecture": "x86_64", "avx512_f": True}


@pytest.mark.parametrize(
    ("flags", "limits", "fast"),
    [
        (AMX, {}, True),
        (AMX | {"amx_bf16": False}, {}, True),
        (AVX2, {}, False),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (AMX, {"DNNL_MAX_CPU_ISA": "avx2_vnni"}, False),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, False),
        # In doubt: measured.
        (AVX512, {}, None),
        (AMX, {"ATEN_CPU_CAPABILITY": "avx2"}, None),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, None),
        ({"architecture": "aarch64"}, {}, None),
    ],
)
def test_the_table_heeds_flags_and_limits(
    flags: dict[str, object], limits: dict[str, str], fast: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    verdict = bfloat16_on("cpu", 64)
    assert verdict.why.startswith("measured: ") if fast is None else verdict.fast is fast


def test_a_base_in_bfloat16_is_computed_in_float32_where_that_is_fast(avx2: None, stored: dict[str, str]) -> None:
    config = of(stored["bfloat16"], actions={"mixed_precision": "auto"}, clone={"mixed_precision": "bf16"}, improve={})
    found, reasons = decided(config)
    assert found.base.dtype == "float32" and found.actions is not None and found.actions.mixed_precision == "no"
    assert found.clone == config.clone and found.improve == config.improve
    assert [reason.split(" (")[0] for reason in reasons] == [
        "base.dtype: float32",
        "mixed_precision: no in actions",
    ]
    assert all("AVX2" in reason for reason in reasons)
    assert with_types_of(config, found) == found and with_types_of(found, config) == found


def test_weights_are_never_rounded(stored: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMX)
    found = {dtype: decided(of(model, improve={"mixed_precision": "auto"}))[0] for dtype, model in stored.items()}
    assert {dtype: config.base.dtype for dtype, config in found.items()} == {
        "float32": "float32",
        "bfloat16": "bfloat16",
        "float16": "float32",  # slow on every processor
    }
    assert {config.improve.mixed_precision for config in found.values() if config.improve} == {"bf16"}


def test_float32_must_fit(avx2: None, stored: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(TINY).parameters())
    config = of(stored["bfloat16"], rollout={"num_workers": 3})
    monkeypatch.setattr(number_type, "free_memory", lambda: 4 * size * 4)
    assert decided(config)[0].base.dtype == "float32"
    monkeypatch.setattr(number_type, "free_memory", lambda: 4 * size * 4 - 1)
    found, (reason,) = decided(config)
    assert found.base.dtype == "bfloat16" and "4 copies" in reason and "rollout.num_workers" in reason


def test_a_slow_choice_is_said(avx2: None, stored: dict[str, str]) -> None:
    data = of(stored["bfloat16"], actions={"mixed_precision": "bf16"}).model_dump(mode="json")
    data["base"]["dtype"] = "bfloat16"
    (warning,) = slow_choices(RunConfig.model_validate_json(json.dumps(data)))
    assert "actions.mixed_precision, base.dtype" in warning and "set auto" in warning
    assert not list(slow_choices(of(stored["bfloat16"])))


def test_the_run_writes_what_was_decided_and_its_stages_may_differ(
    avx2: None, stored: dict[str, str], tmp_path: Path
) -> None:
    clone: dict[str, object] = {name: value for name, value in ONE.items() if name != "min_alive_share"}
    config = of(
        stored["bfloat16"], actions=ONE | {"mixed_precision": "bf16"}, clone=clone | {"mixed_precision": "auto"}
    )
    folder = run(config, tmp_path / "run")
    text = (folder / CONFIG).read_text()
    assert text.startswith("# base.dtype: float32 (ONEDNN_MAX_CPU_ISA=AVX2")
    written = load_config(folder / CONFIG)
    assert (written.base.dtype, written.actions.mixed_precision, written.clone.mixed_precision) == (  # type: ignore[union-attr]
        "float32",
        "bf16",
        "no",
    )
    assert [event["text"].split(":")[0] for event in read_events(folder) if event["kind"] == "number_type"] == [
        "base.dtype",
        "mixed_precision",
    ]
    os.environ.pop("ONEDNN_MAX_CPU_ISA")  # another machine
    resume(folder)
    assert (folder / CONFIG).read_text() == text


def test_a_run_of_before_keeps_the_meaning_that_auto_had(avx2: None, stored: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    text = dump_config(of(stored["bfloat16"], actions=ONE)).encode()
    manifest.put(folder, CONFIG, text, keep=True)
    resume(folder)
    assert (folder / CONFIG).read_bytes() == text and b"dtype: auto" in text
    assert LatentActionLM.from_pretrained(folder / "checkpoints" / "actions").base.dtype == torch.bfloat16
