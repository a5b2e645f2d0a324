"""An export behind HTTP by Ray Serve: OpenAI's completions, with the codes in the reply and codes or a mask of them in the request.

Annotations are evaluated here, unlike elsewhere: FastAPI reads them in the replica, where strings would name nothing.
"""

import asyncio
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from latent_control.text import Ask, Completion, TextModel
from pipeline.cluster import DRIVER_ENVIRONMENT, WORKER_ENVIRONMENT

LARGEST_BATCH, BATCH_SECONDS, MOST_PROMPTS = 64, 0.01, 128
STARTUP_SECONDS = 300.0


class Request(BaseModel):
    """What both endpoints take. A field that would have no effect is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    """Of codes, not of tokens."""
    top_k: int | None = None
    n: int = Field(default=1, ge=1, le=MOST_PROMPTS)
    seed: int | None = Field(default=None, ge=0)
    codes: list[int] = []
    """To take at the first tokens; -1 leaves the choice to the policy."""
    allowed_codes: list[int] | None = None
    user: str | None = None


class TextRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str]


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[dict[str, str]] = Field(min_length=1)


api = FastAPI(title="latent-control", docs_url="/docs")


def codes_of(one: Completion) -> dict[str, Any]:
    """What a choice says beside its text. (Stands before the class, which ``serve.ingress`` copies as it is then.)"""
    kept = asdict(one)
    return {name: kept[name] for name in ("finish_reason", "tokens", "codes", "code_log_probs")}


@serve.ingress(api)
class Completions:
    """One replica: a model, and requests that arrive together decoded together."""

    def __init__(self, folder: str, dtype: str, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.name = Path(folder).name
        self.text = TextModel.load(folder, dtype=dtype, device=device)

    @serve.batch(max_batch_size=LARGEST_BATCH, batch_wait_timeout_s=BATCH_SECONDS)
    async def _together(self, asks: list[Ask]) -> list[Completion]:
        return await asyncio.to_thread(self.text.complete, asks)

    async def _answer(self, request: Request, prompts: Sequence[str | list[dict[str, str]]]) -> tuple[list[Completion], dict[str, Any]]:
        """The completions of a request, prompt by prompt, and what is the same in both endpoints' replies."""
        if len(prompts) * request.n > MOST_PROMPTS:
            raise HTTPException(400, f"{len(prompts)} prompts x n={request.n}: at most {MOST_PROMPTS} completions a request")
        given = {"max_new_tokens": request.max_tokens} | request.model_dump(include={"temperature", "top_k", "codes", "allowed_codes"})
        try:
            asks = [
                self.text.ask(
                    prompt, **given, seed=None if request.seed is None else request.seed * MOST_PROMPTS + index * request.n + copy
                )
                for index, prompt in enumerate(prompts)
                for copy in range(request.n)
            ]
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        found = list(await asyncio.gather(*(self._together(ask) for ask in asks)))
        used = {
            "prompt_tokens": sum(one.prompt_tokens for one in found[:: request.n]),
            "completion_tokens": sum(len(one.codes) for one in found),
        }
        usage = used | {"total_tokens": sum(used.values())}
        return found, {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name, "usage": usage}

    @api.get("/v1/models")
    def models(self) -> dict[str, Any]:
        """The one model there is."""
        shape = self.text.model.config
        return {"object": "list", "data": [{"id": self.name, "object": "model", "num_actions": shape.num_actions, "span": shape.span}]}

    @api.post("/v1/completions")
    async def completions(self, request: TextRequest) -> dict[str, Any]:
        """Continue each prompt ``n`` times."""
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        found, reply = await self._answer(request, prompts)
        choices = [{"index": index, **codes_of(one), "text": one.text} for index, one in enumerate(found)]
        return reply | {"object": "text_completion", "choices": choices}

    @api.post("/v1/chat/completions")
    async def chat(self, request: ChatRequest) -> dict[str, Any]:
        """The assistant's next turn, ``n`` times."""
        found, reply = await self._answer(request, [request.messages])
        choices = [
            {"index": index, **codes_of(one), "message": {"role": "assistant", "content": one.text}} for index, one in enumerate(found)
        ]
        return reply | {"object": "chat.completion", "choices": choices}


@contextmanager
def serving(folder: Path, *, host: str, port: int, replicas: int, dtype: str, device: str) -> Iterator[str]:
    """The export in ``folder`` at ``http://host:port`` for the length of a block; gives the address.

    Raises:
        ValueError: the replicas did not come up.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in DRIVER_ENVIRONMENT.items()})
    threads = max(1, (os.cpu_count() or 1) // replicas)
    environment = WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    gpus = 1 if device.startswith("cuda") else 0
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, replicas + 1),
        include_dashboard=False,
        runtime_env={"env_vars": environment},
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
        options = serve.deployment(Completions, num_replicas=replicas, ray_actor_options={"num_cpus": 1, "num_gpus": gpus})
        try:
            serve.run(options.bind(str(folder), dtype, device, threads), name="latent-control")
        except RuntimeError as error:
            raise ValueError(f"{folder} could not be served: {str(error).strip().splitlines()[-1]}") from error
        yield f"http://{host}:{port}"
    finally:
        ray.shutdown()  # a private Ray: Serve ends with it
