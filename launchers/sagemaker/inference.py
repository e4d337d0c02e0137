"""Handler of a SageMaker endpoint (PyTorch inference image, CPU or GPU) for a folder that hosting.py made.

Requests and answers have the forms of `esm_neuron/inference/requests.py`, as those of `esm-neuron serve`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esm_neuron.inference.requests import Records, read_request, write_answer
from esm_neuron.inference.serving import Predictor, load

input_fn = read_request
output_fn = write_answer


def model_fn(model_dir: str) -> Predictor:
    """Load the model, once per worker, on the device that was given to hosting.py."""
    return load(Path(model_dir))


def predict_fn(records: Records, model: Predictor) -> list[dict[str, Any]]:
    """Return the predictions, in order."""
    return model.predict(records)
