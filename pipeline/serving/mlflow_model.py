"""The MLflow model, as code: MLflow copies this file and ``latent_control`` beside the export (or a bank's member) and
runs it where the model is loaded.

So it imports nothing else of this project, and is never unpickled. One row in, one row out; see
``pipeline/serving/registry.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow


class LatentModel(mlflow.pyfunc.PythonModel):
    """Answers ``{"prompt": [...]}``, optionally with ``"codes"`` forced per row; the columns of the answer are in its
    signature. A prompt is encoded as in training: where that was a chat, as a user message."""

    def load_context(self, context: Any) -> None:
        """Load the export once; or a member, and its bank's world from where ``model_config["world"]`` says.

        Raises:
            ValueError: that is not the world of the member's bank, or the member was changed.
        """
        from latent_control import LatentActionForCausalLM
        from latent_control.text import load_tokenizer

        member = context.artifacts.get("member")
        folder = Path(context.artifacts["export"] if member is None else context.model_config["world"])
        self.model = LatentActionForCausalLM.from_pretrained(folder, trust_remote_code=False)
        if member is not None:
            self._become(Path(member), folder)
        self.tokenizer = load_tokenizer(folder, key=None)
        record = folder / "provenance.json"
        trained = json.loads(record.read_text()).get("config") if record.is_file() else None
        self.chat = bool(trained and trained["task"]["chat"])

    def _become(self, member: Path, world: Path) -> None:
        """Put the policy of ``member`` in the place of the world's own."""
        from latent_control.pretrained import weights_hash, world_hash
        from latent_control.tensor_files import read_weights

        record = json.loads((member / "member.json").read_text())
        if (found := world_hash(self.model.latent)) != record["world_hash"]:
            raise ValueError(
                f"{world} has the world hash {found[:12]}; {record['name']}@{record['version']} belongs to the bank "
                f"whose world has {record['world_hash'][:12]}: load it with model_config={{'world': 'BANK/world'}}"
            )
        tensors = read_weights(member / "member.safetensors")
        if weights_hash(tensors.items()) != record["sha256"]:
            raise ValueError(f"{member} is not what was registered: its hash differs from its record's")
        self.model.latent.policy.load_state_dict(tensors)

    def predict(self, context: Any, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """A frame with the columns text, codes and finish_reason, for a frame (or records) with the columns of the
        signature."""
        import pandas

        from latent_control.decoding.sampling_params import require_temperature
        from latent_control.decoding.stop_strings import ended
        from latent_control.text import encode_text, left_padded, spoken_text

        settings = dict(params or {})
        prompts = list(model_input["prompt"])
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(f"prompt is {wrong[0]!r:.80}: one string per row; give a DataFrame or a list of records")
        codes = [_codes(row) for row in model_input["codes"]] if "codes" in model_input else None
        if not prompts:  # as Spark's partitions may be
            return pandas.DataFrame({"text": [], "codes": [], "finish_reason": []})
        encoded = [encode_text(self.tokenizer, prompt, chat=self.chat) for prompt in prompts]
        if blank := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if not ids]:
            raise ValueError(f"prompt {blank[0]!r} has no tokens: send some text")
        ids, mask = left_padded(encoded)
        temperature = require_temperature(float(settings.get("temperature", 0.0)))
        limit = settings.get("max_tokens", 0) or self.model.generation_config.max_new_tokens or 0
        positions = getattr(self.model.latent.base.decoder.config, "max_position_embeddings", None)
        if limit < 0 or (positions is not None and ids.shape[1] + limit > positions):
            raise ValueError(
                f"max_tokens={limit} beside a prompt of {ids.shape[1]} tokens: give a positive number, or 0 for the "
                f"export's own; the model has {positions} positions"
            )
        allowed = [int(code) for code in settings.get("allowed_codes", ())]
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=settings.get("max_tokens", 0) or None,
            do_sample=temperature > 0,
            temperature=temperature or None,
            decode=settings.get("decode") or None,
            seed=settings["seed"] if settings.get("seed", -1) >= 0 else None,
            codes=codes,
            allowed_codes=allowed or None,
            return_codes=True,
            tokenizer=self.tokenizer,
        )
        lengths = out.lengths.tolist()
        stop = self.model.generation_config.stop_strings or []
        new = [row[:n] for row, n in zip(out.sequences[:, ids.shape[1] :].tolist(), lengths, strict=True)]
        return pandas.DataFrame(
            {
                "text": [spoken_text(self.tokenizer, row, stop) for row in new],
                "codes": [row[:n].tolist() for row, n in zip(out.codes, lengths, strict=True)],
                "finish_reason": ["stop" if ended(self.tokenizer, stop, row) else "length" for row in new],
            }
        )


def _codes(row: Any) -> list[int] | None:
    """A row's forced codes; pandas has NaN for a row without."""
    if row is None or (isinstance(row, float) and row != row):
        return None
    if isinstance(row, str | int | float) or any(isinstance(code, str | bool) or code != int(code) for code in row):
        raise ValueError(f"codes has {row!r:.80}: give a list of whole numbers per row, or null")
    return [int(code) for code in row]


mlflow.models.set_model(LatentModel())
