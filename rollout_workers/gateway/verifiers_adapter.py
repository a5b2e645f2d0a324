"""Plays one task of a Prime ``verifiers`` environment (0.4, ``verifiers.v1``) through the gateway; an agent program.

Run by the interpreter of an environment that has ``verifiers``; nothing of this project is imported. Its argument is
JSON: ``{"env": {"taskset": {"id": ...}, ...}, "train": 64, "folder": null, "success_at": 1.0}``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import types
import urllib.request
from typing import Any

import verifiers.v1 as vf  # type: ignore[import-not-found,unused-ignore]
from verifiers.v1.clients import EvalClientConfig, ModelContext  # type: ignore[import-not-found,unused-ignore]
from verifiers.v1.harnesses.null import NullHarness  # type: ignore[import-not-found,unused-ignore]
from verifiers.v1.types import SamplingConfig  # type: ignore[import-not-found,unused-ignore]
from verifiers.v1.utils.loaders import (  # type: ignore[import-not-found,unused-ignore]
    load_environment,
    resolve_env_config,
)

HERE = "latent_control_here"
"""Id of the harness below, for ``env.agent.harness.id``."""


class HereRuntime:
    """A runtime whose programs run by this very interpreter: ``verifiers`` brings all that they import, and nothing is
    installed for each."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    async def prepare_uv_script(self, script: str | bytes, env: Any = None, *, activate: bool = True) -> list[str]:
        """As the runtime's, without uv."""
        await self._runtime.write("chat_program.py", script.encode() if isinstance(script, str) else script)
        return [sys.executable, "chat_program.py"]


class HereHarness(NullHarness):  # type: ignore[misc,unused-ignore]
    """The chat loop of ``verifiers`` (with the task's tools), run by this interpreter."""

    async def setup(self, runtime: Any) -> None:
        """As the null harness."""
        await super().setup(HereRuntime(runtime))

    async def launch(self, ctx: Any, trace: Any, runtime: Any, *args: Any, **more: Any) -> Any:
        """As the null harness."""
        return await super().launch(ctx, trace, HereRuntime(runtime), *args, **more)


async def play(asked: dict[str, Any]) -> Any:
    """The episode of the task that the gateway asks for."""
    wanted = json.loads(os.environ["LATENT_CONTROL_EPISODE"])
    index = wanted["number"] + (asked["train"] if wanted["split"] == "heldout" else 0)
    env = load_environment(resolve_env_config(asked["env"]))
    task = next(iter(env.taskset.skip(index).take(1)), None)
    if task is None:
        raise SystemExit(f"the taskset has no task {index}: set task.options.train and heldout to fewer")
    client = EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    async with env.serving():
        return await env.run_episode(task, ModelContext(client=client, model="policy", sampling=SamplingConfig()))


def main() -> None:
    """Play, and give the reward; an episode with errors gets none."""
    asked = json.loads(sys.argv[1])
    sys.path[:0] = [asked["folder"]] if asked["folder"] else []
    plugin = types.ModuleType(HERE)
    plugin.__dict__.update(HereHarness=HereHarness, __all__=["HereHarness"])
    sys.modules[HERE] = plugin
    episode = asyncio.run(play(asked))
    if not episode.ok:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        raise SystemExit(
            "; ".join(f"{error.type}: {error.message}" for error in errors)[:1000] or "it did not end well"
        )
    reward = sum(trace.reward for trace in episode.traces)
    body = {"reward": reward, "success": reward >= asked["success_at"]}
    request = urllib.request.Request(
        f"{os.environ['OPENAI_BASE_URL']}/sessions/{os.environ['LATENT_CONTROL_SESSION']}/reward",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    urllib.request.urlopen(request).read()


if __name__ == "__main__":
    assert vf
    main()
