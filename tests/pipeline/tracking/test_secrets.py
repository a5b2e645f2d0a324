"""Secrets stay out of what a run writes and stores; names in its files lead nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.redaction import without_secrets
from configs.schema import RunConfig
from pipeline.replay.writer import ReplayWriter
from pipeline.storage import checkpoints
from pipeline.storage.atomic import sealed, unseal
from pipeline.tracking.provenance import circumstances
from pipeline.tracking.uris import flatten

URIS = {
    "postgresql://me:s3cret@host/db": "postgresql://me:***@host/db",
    "https://s3cret@host/x": "https://***@host/x",
    "postgresql://host/db?user=me&password=s3cret": "postgresql://host/db?user=me&password=***",
    "https://host/?api_key=s3cret&b=1": "https://host/?api_key=***&b=1",
    "sqlite:////a/b.db": "sqlite:////a/b.db",
    "http://127.0.0.1:5000": "http://127.0.0.1:5000",
}


@pytest.mark.parametrize("uri", URIS)
def test_a_stores_secrets_are_in_no_manifest_and_no_parameter(tmp_path: Path, uri: str) -> None:
    assert without_secrets(uri) == URIS[uri]
    config = RunConfig(base={"model": "m"}, tracking={"uri": uri})
    told = json.dumps([circumstances(config, tmp_path, "improve", 3), flatten(config.model_dump(mode="json"))])
    assert "s3cret" not in told and URIS[uri] in told


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    folder = tmp_path / "t-00000001"
    checkpoints.write(folder, files=lambda f: (f / "a").write_text("x") and None, info={"stage": "t", "update": 1})
    content = unseal(folder / "manifest.json")
    content["files"]["../elsewhere"] = content["files"]["a"]
    (folder / "manifest.json").write_bytes(sealed(content))
    assert checkpoints.verify(folder) == ["../elsewhere is missing"]
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    assert "b is not in manifest.json" in checkpoints.verify(folder)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", ""])
def test_a_run_id_names_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="it names a folder"):
        ReplayWriter(tmp_path / "replay", 8, name)
