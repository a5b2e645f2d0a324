"""Files for KubeRay and Slurm: fields, sizes, and the batch script run with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from configs.schema import RunConfig
from pipeline.cli.main import app
from pipeline.cluster.manifests import job_name
from pipeline.preflight.resources import nodes_needed
from pipeline.runs.summary import read_summary

ROOT = Path(__file__).resolve().parents[3]
SRUN = 'while [ "${1#-}" != "$1" ]; do [ "$1" = -w ] && shift; shift; done; exec "$@"'
"""Slurm's program without its options: what is left runs here."""

# Fields of ray.io/v1 and of a pod that the file may use, as KubeRay's and Kubernetes' API references have them.
CONTAINER = {
    "name": str,
    "image": str,
    "resources": {kind: {"cpu": str, "memory": str, "nvidia.com/gpu": str} for kind in ("limits", "requests")},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "spec": {
        "securityContext": {"runAsNonRoot": bool, "fsGroup": int},
        "containers": [CONTAINER],
        "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    }
}
WORKERS = dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), int)
WORKERS |= {"groupName": str, "rayStartParams": {}, "template": POD}
RAYJOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "headGroupSpec": {"rayStartParams": {"num-cpus": str}, "template": POD},
            "workerGroupSpecs": [WORKERS],
        },
    },
}


def fits(value: Any, shape: Any) -> bool:
    """Whether a value has no field but those of a shape, each of its type."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and value.keys() <= shape.keys() and all(fits(value[k], shape[k]) for k in value)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    return type(value) is shape


def printed(*words: str) -> str:
    done = CliRunner().invoke(app, ["cluster-files", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_shape_of_a_field_that_is_not_there_is_found() -> None:
    assert not fits({"metadata": {"nam": "x"}}, RAYJOB) and not fits({"metadata": {"name": 3}}, RAYJOB)


def test_a_rayjob_has_kuberays_fields_and_the_nodes_that_the_config_needs() -> None:
    # 40 workers of 1 CPU: the head gives 16 - 2 (learner_threads) = 14, two more nodes 32: 46 >= 40, 30 < 40.
    job = yaml.safe_load(
        printed("kuberay", "quickstart", "rollout.num_workers=40", "--run-dir", "/shared/runs/First_run")
    )
    assert fits(job, RAYJOB)
    assert (job["apiVersion"], job["kind"], job["metadata"]) == (
        "ray.io/v1",
        "RayJob",
        {"name": "latent-control-first-run"},
    )
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "14"}
    assert cluster["workerGroupSpecs"][0]["replicas"] == 2
    assert shlex.split(job["spec"]["entrypoint"]) == [
        *("latent-control", "job", "quickstart", "rollout.num_workers=40", "--run-dir", "/shared/runs/First_run")
    ]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_ENABLE_AUTO_CONNECT"] == "0"
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_gpus_are_asked_for_where_nodes_have_some() -> None:
    words = ["quickstart", "rollout.gpus_per_worker=1", "rollout.num_workers=6", "--run-dir", "/s/r"]
    job = yaml.safe_load(printed("kuberay", *words, "--node-gpus", "4"))
    limits = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]
    assert limits["limits"]["nvidia.com/gpu"] == "4"
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 1  # 2 nodes of 4 for 6
    assert "--nodes=2 " in (script := printed("slurm", *words, "--node-gpus", "4")) and "--gpus-per-node=4" in script
    done = CliRunner().invoke(app, ["cluster-files", "slurm", *words])
    assert done.exit_code == 2 and "rollout.gpus_per_worker" in done.stderr and "--node-gpus" in done.stderr


def test_needs_are_counted_with_the_head() -> None:
    config = RunConfig(base={"model": "x"}, improve={}, rollout={"num_workers": 4})
    assert nodes_needed(config, {"CPU": 4}, {"CPU": 4}) == 1
    assert nodes_needed(config, {"CPU": 4}, {"CPU": 2}) == 2
    with pytest.raises(ValueError, match="--node-cpus"):
        nodes_needed(config, {"CPU": 0}, {"CPU": 2})


@pytest.mark.parametrize(
    ("name", "given"),
    [("latent-control-a-b", "A_b"), ("latent-control-x", "--x--"), ("latent-control", "ä"), ("", "long" * 30)],
)
def test_names_are_those_of_kubernetes(name: str, given: str) -> None:
    made = job_name(Path("/shared") / given)
    assert len(made) <= 47 and made.replace("-", "").isalnum() and made[-1] != "-"
    assert name in ("", made)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["kuberay", "quickstart", "--run-dir", "runs/x"], "--run-dir: runs/x is relative"),
        (["slurm", "quickstart", "improve.updats=1", "--run-dir", "/s/x"], "did you mean improve.updates?"),
        (["kuberay", "OWN", "--run-dir", "/shared/x"], "outside of /shared, which the pods mount"),
    ],
)
def test_what_cannot_run_is_refused(words: list[str], wrong: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("base: {model: m}\n")
    done = CliRunner().invoke(app, ["cluster-files", *(str(own) if word == "OWN" else word for word in words)])
    assert done.exit_code == 2 and wrong in done.stderr and not done.stdout


def test_a_users_config_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "configs" / "models")
    (tmp_path / "my config.yaml").write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    script = printed("slurm", "my config.yaml", "--run-dir", "/s/it's; rm x")
    assert shlex.split(script.splitlines()[-2]) == [
        *("latent-control", "job", str(tmp_path / "my config.yaml"), "--run-dir", "/s/it's; rm x", "&")
    ]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    """Variables for a batch script on one node whose programs are these lines of bash."""
    folder.mkdir()
    for name, text in {"scontrol": "echo 127.0.0.1", "srun": SRUN, **programs}.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name.replace("_", "-")).chmod(stat.S_IRWXU)
    return os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "1",
    }


@pytest.mark.parametrize(
    ("ray", "run", "code"),
    [
        ('[ "$1" = health-check ] || sleep 60', "exit 3", 3),  # the run's own code
        ('[ "$1" = health-check ] || { sleep 1; exit 7; }', "sleep 60", 7),  # Ray's head ends under the run
        ("exit 1", "exit 0", 1),  # it never starts
    ],
)
def test_the_batch_ends_with_the_run_or_with_rays_head(ray: str, run: str, code: int, tmp_path: Path) -> None:
    environment = stand_ins(tmp_path / "bin", ray=ray, latent_control=run)
    script = printed("slurm", "quickstart", "--run-dir", str(tmp_path / "first"))
    started = time.monotonic()
    done = subprocess.run(["bash", "-c", script], env=environment, stdout=subprocess.DEVNULL, timeout=50, check=False)
    assert done.returncode == code and time.monotonic() - started < 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_batch_script_runs_a_run_to_its_end(tmp_path: Path) -> None:
    """One node; ``scontrol`` and ``srun`` are stand-ins that name this machine and run what they are given here."""
    tiny = ["actions.updates=3", "clone.updates=2", "improve.updates=2", "evaluation.prompts=8", "explorer.seconds=0"]
    tiny += ["actions.min_alive_share=0.0", "tracking.enabled=false", "rollout.num_workers=1"]
    run_dir = tmp_path / "first"
    script = tmp_path / "job.sbatch"
    script.write_text(printed("slurm", "quickstart", *tiny, "--run-dir", str(run_dir), "--node-cpus", "4"))
    environment = stand_ins(tmp_path / "bin", latent_control=f'exec {sys.executable} -m pipeline "$@"')
    batch = subprocess.Popen(
        ["bash", str(script)], env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    try:
        said, _ = batch.communicate(timeout=800)
    finally:  # Slurm ends what a batch leaves behind
        with suppress(ProcessLookupError):
            os.killpg(batch.pid, signal.SIGTERM)
    assert batch.returncode == 0, said[-3000:]
    assert set(read_summary(run_dir)["stages"]) == {"actions", "clone", "improve"}
