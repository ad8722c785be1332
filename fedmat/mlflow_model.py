"""The model script that MLflow stores with a registered model and runs to load it ("models from code": no pickle).

Knows: where the weights file lies inside a logged model. Refuses to know: everything else; ``fedmat.serving`` predicts.
Only MLflow runs this file; nothing imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

import fedmat.telemetry  # noqa: F401  MLflow is running already, the science is not
from fedmat import serving, wire


class FedmatModel(PythonModel):
    """Raw records (contract fields, contract units) to ``prediction`` and ``in_domain``."""

    def load_context(self, context: Any) -> None:
        """Reads the weights once, when the model is loaded."""
        self.predictor = serving.Predictor.of(wire.load_model(Path(context.artifacts["model"])))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Returns one row per record; see :func:`fedmat.serving.predict`."""
        return self.predictor.predict(model_input)


set_model(FedmatModel())
