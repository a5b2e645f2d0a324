"""The MLflow model of an export, logged as code: ``mlflow.pyfunc.load_model(URI).predict([{"prompt": "..."}])``.

MLflow runs this file where the model is loaded; beside it travel the export and the package ``latent_control``, nothing else of ours.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from latent_control.text import TextModel


class LatentActions(PythonModel):  # type: ignore[misc]
    """Column ``prompt`` in; ``text``, ``codes`` and ``finish_reason`` out."""

    def load_context(self, context: Any) -> None:
        """Load the export."""
        self.text = TextModel.load(context.artifacts["export"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One completion per row; ``params``: max_new_tokens, temperature (0: greedy), seed (-1: none)."""
        given = {name: value for name, value in (params or {}).items() if value is not None and not (name == "seed" and value < 0)}
        asks = [self.text.ask(prompt, **given) for prompt in model_input["prompt"]]
        found = self.text.complete(asks)
        return pd.DataFrame([{"text": one.text, "codes": one.codes, "finish_reason": one.finish_reason} for one in found])


set_model(LatentActions())
