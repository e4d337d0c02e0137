"""Handler of a SageMaker endpoint (PyTorch inference image, CPU or GPU) for a folder that hosting.py made.

Requests: application/json `{"records": [{"id": "P1", "sequence": "MKT..."}]}` or `{"sequences": ["MKT..."]}`, or FASTA
as text/plain. The response is JSON, `{"predictions": [{"id": "P1", "label": "membrane", ...}]}` in the order of the
request, with the columns of `esm-neuron predict`; null where there is no value, as for residues that were cut off. A
request that cannot be used is an error of one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esm_neuron.errors import DataError
from esm_neuron.files import parse_json
from esm_neuron.inference.serving import Predictor, load

Records = list[tuple[str, str]]


def model_fn(model_dir: str) -> Predictor:
    """Load the model, once per worker, on the device that was given to hosting.py."""
    return load(Path(model_dir))


def input_fn(body: str | bytes, content_type: str) -> Records:
    """Return (id, sequence) of each protein of a request.

    Raises:
        DataError: the request does not have the form above.
    """
    try:
        text = body.decode("utf-8") if isinstance(body, bytes) else body
    except UnicodeDecodeError as error:
        raise DataError(f"request is not UTF-8 ({error.reason} at byte {error.start}); send UTF-8") from error
    kind = content_type.partition(";")[0].strip()
    if kind == "text/plain":
        return _fasta(text)
    if kind != "application/json":
        raise DataError(f"content type {content_type!r}; send application/json, or FASTA as text/plain")
    try:
        request = parse_json(text)
        if "sequences" in request:
            return [(str(number), _sequence(value)) for number, value in enumerate(_list(request["sequences"]))]
        return [(str(record["id"]), _sequence(record["sequence"])) for record in _list(request["records"])]
    except (ValueError, KeyError, TypeError) as error:
        form = '{"records": [{"id": "P1", "sequence": "MKT"}]} or {"sequences": ["MKT"]}'
        raise DataError(f"request is not {form}: {error!r}") from error


def predict_fn(records: Records, model: Predictor) -> list[dict[str, Any]]:
    """Return the predictions, in order."""
    return model.predict(records)


def output_fn(predictions: list[dict[str, Any]], accept: str) -> str:
    """Return the predictions as JSON, whatever `accept` says: there is one form."""
    return json.dumps({"predictions": predictions}, allow_nan=False)


def _fasta(text: str) -> Records:
    before, *records = ("\n" + text).split("\n>")
    if before.strip() or not records:
        raise DataError("request is not FASTA; begin each record with a line >ID")
    parts = [record.partition("\n") for record in records]
    return [(header.split()[0] if header.split() else "", "".join(body.split())) for header, _, body in parts]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__}, not a list")
    return value


def _sequence(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a sequence is {type(value).__name__}, not text")
    return value
