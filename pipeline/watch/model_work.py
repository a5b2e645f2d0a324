"""Questions that need a run's model, answered in a separate process (``model_process``): steering's, counterfactuals of
one rollout, where codes fire in a typed text, and what banning or forcing a code changes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from latent_control.analysis.explain import read_choices, tokens_of_codes
from latent_control.decoding.generate import generate
from latent_control.decoding.guide import make_guide
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.decoding.stop_strings import stop_watch
from latent_control.distributions import rollout_seed
from latent_control.model import latent_actor
from latent_control.pretrained import base_path
from latent_control.records import Generation, TokenBatch
from latent_control.text import left_padded
from pipeline.evaluation.statistics import paired_difference
from pipeline.pages.explorer.on_demand import explained
from pipeline.pages.explorer.policies import policies_of, with_policy_before
from pipeline.pages.explorer.reading import Models
from pipeline.pages.explorer.why import prompt_of
from pipeline.serving import export
from pipeline.steering.loading import load
from pipeline.steering.steerer import Steerer
from pipeline.steering.web import answers_of
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.requests import parse
from rollout_workers.tasks import Prompt, Score
from rollout_workers.tasks.encoding import decode_response

WEIGHTS = (".safetensors", ".bin", ".pt")
LISTED_CODES, MOST_PROMPTS, FLIPS = 5, 100, 6
"""Codes of a place in a typed text; held-out prompts of an ablation, and answers of it that are shown."""


class Fires(BaseModel):
    """A typed text: at each of its tokens, the codes that the policy would choose for it."""

    model_config = ConfigDict(extra="forbid")
    text: StrictStr = Field(min_length=1, max_length=4000)


class Ablation(BaseModel):
    """``Ablation(code=7, how="force", place=2)``: ban code 7 everywhere, or force it at token 2."""

    model_config = ConfigDict(extra="forbid")
    code: StrictInt = Field(ge=0)
    how: Literal["ban", "force"] = "ban"
    place: StrictInt = Field(0, ge=0, le=1023)
    prompts: StrictInt = Field(MOST_PROMPTS, ge=2, le=MOST_PROMPTS)


class ModelWork:
    """A run's model and its answers, one at a time."""

    def __init__(self, folder: Path, most_gib: float) -> None:
        """``ValueError`` or ``OSError`` where the run has no policy over codes yet, or more weights than stated."""
        size = weights_gib(export.find(folder).checkpoint)
        if size > most_gib:
            raise ValueError(
                f"the model has {size:.2f} GiB of weights: at most {most_gib:g} are loaded beside the page; "
                f"start it by latent-control watch --model-gib {size + 0.01:.2f} if memory suffices"
            )
        self.folder, self.loaded = folder, load(folder, device="cpu")
        assert self.loaded.config is not None
        self.config = self.loaded.config
        torch.set_num_threads(self.config.cluster.learner_threads)
        self.questions: dict[str, Callable[[bytes], Any]] = answers_of(Steerer(self.loaded)) | {
            "explain": lambda body: self.explain(json.loads(body)),
            "fires": lambda body: self.fires(parse(body, Fires)),
            "ablate": lambda body: self.ablate(parse(body, Ablation)),
        }

    @cached_property
    def models(self) -> Models:
        """The policies before and after RL; ``ValueError`` where there are no two."""
        before, _ = policies_of(self.folder, hashes=False)
        return with_policy_before(self.loaded.model, before, self.config, self.loaded.tokenizer)

    def explain(self, row: dict[str, Any]) -> dict[str, Any]:
        """Counterfactuals of a rollout of the replay buffer, or of an answer of the evaluation, which is played again.
        ``note`` says where that came out otherwise."""
        task = self.loaded.task
        if task is None:
            raise ValueError(self.loaded.note)
        played, note = (row, "") if "variant" not in row else self._played_again(row)
        return explained(played, self.models, self.config, task) | {"note": note}

    def _played_again(self, row: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """A held-out answer of the improved policy with its tokens and codes, by its random stream."""
        assert self.loaded.task is not None
        prompt = prompt_of(self.loaded.task, row["prompt_id"], row["prompt_text"])
        if prompt is None or row["variant"] != "improved" or row["finish_reason"] == "greedy_token":
            raise ValueError(
                f"{row['rollout_id']} is an answer of {row['variant']}, {row['finish_reason']}: counterfactuals of "
                "held-out answers are those of the improved policy by code (improved, sampled or greedy), to prompts "
                "that the task still has"
            )
        place = int(row["prompt_id"].rpartition("/")[2])
        seed = rollout_seed(rollout_seed(self.config.seed, 1) >> 1, place, row["sample"])
        temperature = 0.0 if row["finish_reason"] == "greedy" else self.config.rollout.temperature
        out = self._generate([prompt], temperature=temperature, row_seeds=[seed])
        length, encoded = int(out.lengths[0]), self.loaded.encode(prompt.text)
        tokens = out.tokens[0, :length].tolist()
        assert out.actions is not None and out.action_logp is not None
        found = {
            "prompt_tokens": encoded,
            "tokens": tokens,
            "generated": [],
            "actions": out.actions[0, :length].tolist(),
            "action_logp": out.action_logp[0, :length].tolist(),
            "turn_rewards": [],
            "level": "latent",
            "world_hash": "",
            "policy_version": 0,
        }
        same = decode_response(self.loaded.tokenizer, tokens, self.config.rollout.stop) == row["text"]
        note = "" if same else "decoded again here, the answer differs from the evaluation's"
        return row | found, note

    def _generate(self, prompts: Sequence[Prompt], code: Ablation | None = None, **params: Any) -> Generation:
        model, loaded = self.loaded.model, self.loaded
        ids, mask = left_padded([loaded.encode(p.text) for p in prompts], model.codebook.device)
        codes, allowed = None, None
        if code is not None and code.how == "force":
            codes = [None] * code.place + [code.code] * model.config.span
        elif code is not None:
            allowed = [k for k in range(model.config.num_actions) if k != code.code]
        guide = make_guide(
            codes, allowed, rows=len(prompts), num_actions=model.config.num_actions, span=model.config.span
        )
        settings = SamplingParams(
            max_new_tokens=self.config.rollout.max_new_tokens,
            batch_size=self.config.rollout.batch_size,
            top_k=self.config.rollout.top_k,
            guide=guide,
            watch=stop_watch(loaded.tokenizer, self.config.rollout.stop),
            **params,
        )
        return generate(model.base, latent_actor(model), settings, ids, mask)

    @torch.no_grad()
    def fires(self, asked: Fires) -> dict[str, Any]:
        """Each token of a text after its first: the likeliest codes of the policy there, with the token each would
        write."""
        model, tokenizer, rollout = self.loaded.model, self.loaded.tokenizer, self.config.rollout
        tokens = tokenizer(asked.text)["input_ids"]
        limit = self.loaded.limits.positions or 4096
        if not 2 <= len(tokens) <= min(limit, 1024):
            raise RefusedRequest(f"the text has {len(tokens)} tokens: give 2 to {min(limit, 1024)}")
        ids = torch.tensor([tokens])
        response = torch.ones_like(ids, dtype=torch.bool)
        response[:, 0] = False
        batch = TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids), response_mask=response)
        told = read_choices(model, [model.policy], batch, temperature=rollout.temperature, top_k=rollout.top_k)
        chances, codes = told.policies[0].topk(min(LISTED_CODES, model.config.num_actions))
        written, _ = tokens_of_codes(model, told.final, codes)
        starts = range(1, len(tokens), model.config.span)

        def word(token: int) -> str:
            text: str = tokenizer.decode([token], skip_special_tokens=False)
            return text

        found = {
            place: [
                {"code": c, "chance": p, "token": word(t)}
                for c, p, t in zip(codes[i].tolist(), chances[i].tolist(), written[i].tolist(), strict=True)
            ]
            for i, place in enumerate(starts)
        }
        return {"tokens": [{"text": word(t), "codes": found.get(i, [])} for i, t in enumerate(tokens)]}

    def ablate(self, asked: Ablation) -> dict[str, Any]:
        """Success of the policy, greedy by code, on the first held-out prompts, as it is and with the code banned or
        forced; the difference with its 95 % interval over prompts."""
        loaded, task = self.loaded, self.loaded.task
        if task is None:
            raise RefusedRequest(loaded.note)
        if asked.code >= loaded.limits.num_actions:
            raise RefusedRequest(f"code is {asked.code}: there are codes 0 to {loaded.limits.num_actions - 1}")
        if asked.how == "force" and not asked.place < self.config.rollout.max_new_tokens:
            raise RefusedRequest(
                f"place is {asked.place}: answers have up to {self.config.rollout.max_new_tokens} tokens"
            )
        heldout = task.prompts("heldout")
        prompts = [heldout[i] for i in range(min(asked.prompts, len(heldout)))]
        free, changed = (self._answers(prompts, code) for code in (None, asked))
        rates = [np.array([bool(success) for _, success, _ in side], float) for side in (free, changed)]
        flips = np.flatnonzero(rates[0] != rates[1])[:FLIPS].tolist()
        used = [asked.code in codes for _, _, codes in free]
        return {
            "prompts": len(prompts),
            "success": [float(side.mean()) for side in rates],
            "difference": paired_difference(rates[1], rates[0], seed=0),
            "used": sum(used),
            "answers_changed": sum(a[0] != b[0] for a, b in zip(free, changed, strict=True)),
            "flips": [
                {"prompt": prompts[i].text, "free": free[i][0], "changed": changed[i][0], "better": bool(rates[1][i])}
                for i in flips
            ],
        }

    def _answers(self, prompts: Sequence[Prompt], code: Ablation | None) -> list[tuple[str, bool, set[int]]]:
        """(text, success, codes) of each prompt, greedy by code."""
        out = self._generate(prompts, code, temperature=0.0)
        assert out.actions is not None
        found = []
        for row, prompt in enumerate(prompts):
            length = int(out.lengths[row])
            tokens = out.tokens[row, :length].tolist()
            score = self.loaded.score(prompt, tokens)
            text = decode_response(self.loaded.tokenizer, tokens, self.config.rollout.stop)
            codes = set(out.actions[row, :length].tolist())
            found.append((text, isinstance(score, Score) and bool(score.success), codes))
        return found


def weights_gib(checkpoint: Path) -> float:
    """GiB of the weight files of a policy and its base LM."""
    folders = {checkpoint, Path(base_path(checkpoint))}
    files = (path for folder in folders if folder.is_dir() for path in folder.rglob("*"))
    return sum(path.stat().st_size for path in files if path.suffix in WEIGHTS) / 2**30


def work(pipe: Connection, folder: Path, most_gib: float) -> None:
    """Answer questions until the pipe closes: a name and a body, answered by ``[status, what was said]``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to the end
    model: ModelWork | None = None
    with suppress(EOFError, OSError):
        while True:
            question, body = json.loads(pipe.recv_bytes()), pipe.recv_bytes()
            try:
                model = model or ModelWork(folder, most_gib)
                reply: list[Any] = [200, model.questions[question](body)]
            except RefusedRequest as refusal:
                reply = [refusal.status, str(refusal)]
            except (ValueError, LookupError, OSError, RuntimeError) as error:  # the last: memory does not suffice
                reply = [400, str(error)]
            pipe.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])), Path(sys.argv[2]), float(sys.argv[3]))
