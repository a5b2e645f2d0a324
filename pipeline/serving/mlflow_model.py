"""The MLflow model, as code: MLflow copies this file and ``latent_control`` beside the export and runs it where the
model is loaded.

So it imports nothing else of this project, and is never unpickled. One row in, one row out; see
``pipeline/serving/registry.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlflow


class LatentModel(mlflow.pyfunc.PythonModel):
    """Answers ``{"prompt": [...]}``, optionally with ``"codes"`` forced per row; the columns of the answer are in its
    signature."""

    def load_context(self, context: Any) -> None:
        """Load the export once."""
        from latent_control import LatentActionForCausalLM
        from latent_control.text import load_tokenizer

        folder = context.artifacts["export"]
        self.model = LatentActionForCausalLM.from_pretrained(folder, trust_remote_code=False)
        self.tokenizer = load_tokenizer(folder, key=None, padding_side="left")

    def predict(self, context: Any, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """A frame with the columns text, codes and finish_reason, for a frame (or records) with the columns of the
        signature."""
        import pandas

        settings = dict(params or {})
        prompts = list(model_input["prompt"])
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(f"prompt is {wrong[0]!r:.80}: one string per row; give a DataFrame or a list of records")
        codes = (
            [None if row is None else [int(code) for code in row] for row in model_input["codes"]]
            if "codes" in model_input
            else None
        )
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True)
        temperature = float(settings.get("temperature", 0.0))
        allowed = [int(code) for code in settings.get("allowed_codes", ())]
        out = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=settings.get("max_tokens", 0) or None,
            do_sample=temperature > 0,
            temperature=temperature or None,
            decode=settings.get("decode") or None,
            seed=settings["seed"] if settings.get("seed", -1) >= 0 else None,
            codes=codes,
            allowed_codes=allowed or None,
            return_codes=True,
        )
        lengths = out.lengths.tolist()
        new = out.sequences[:, batch["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return pandas.DataFrame(
            {
                "text": [
                    self.tokenizer.decode(row[:n], skip_special_tokens=True)
                    for row, n in zip(new, lengths, strict=True)
                ],
                "codes": [row[:n].tolist() for row, n in zip(out.codes, lengths, strict=True)],
                "finish_reason": [
                    "stop" if int(row[n - 1]) in ends else "length" for row, n in zip(new, lengths, strict=True)
                ],
            }
        )


mlflow.models.set_model(LatentModel())
