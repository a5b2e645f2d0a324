"""The Dockerfile, read as text: hadolint (.ci/run) has the rules of style, this has what the image must be."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line.strip()
    for line in re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
STEPS = [(line.partition(" ")[0], line.partition(" ")[2]) for line in LINES]


def of(step: str) -> list[str]:
    return [rest for name, rest in STEPS if name == step]


def test_it_ends_as_a_user_without_rights_and_calls_the_program() -> None:
    assert of("USER") == ["1000:1000"], "a number: Kubernetes' runAsNonRoot cannot judge a name"
    last_stage = STEPS[max(i for i, (name, _) in enumerate(STEPS) if name == "FROM") :]
    assert ("USER", "1000:1000") in last_stage and last_stage[-2:] == [
        ("ENTRYPOINT", '["latent-control"]'),
        ("CMD", '["--help"]'),
    ]


def test_the_base_image_has_a_version_that_the_project_runs_on() -> None:
    (image,) = [rest for rest in of("ARG") if rest.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.1[1-9]-slim-\w+", image)
    assert set(of("FROM")) == {"${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"}


def test_no_argument_or_variable_is_a_secret() -> None:
    named = " ".join([*of("ARG"), *of("ENV")])
    assert not re.search(r"token|password|secret|key", named, re.IGNORECASE)


def test_what_is_copied_is_what_the_wheel_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {word for rest in of("COPY") if "--from" not in rest for word in rest.split()[:-1]}
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == packages | needed | {"requirements.lock"}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied


def test_extras_and_device_are_arguments() -> None:
    arguments = dict(rest.partition("=")[::2] for rest in of("ARG"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(arguments["EXTRAS"].split(",")) <= extras.keys()
    assert arguments["DEVICE"] == "cpu" and arguments["PIP_EXTRA_INDEX_URL"] == ""
    (install,) = [rest for rest in of("RUN") if "pip install" in rest]
    assert "--no-cache-dir" in install and "-c requirements.lock" in install and "torch.version.cuda" in install
