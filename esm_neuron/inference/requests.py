"""Requests to an endpoint and their answers: what `esm-neuron serve` and the handler of SageMaker share.

Requests: application/json `{"records": [{"id": "P1", "sequence": "MKT..."}]}`, `{"sequences": ["MKT..."]}` or
`{"inputs": "MKT..."}` (also a list); application/jsonlines with `id` and `sequence`, or `inputs`, on each line;
text/csv; FASTA as text/plain. The response is JSON, `{"predictions": [{"id": "P1", "label": "membrane", ...}]}`, or a
prediction a line where application/jsonlines is asked for, in the order of the request, with the columns of
`esm-neuron predict`; null where there is no value, as for residues that were cut off. A request that cannot be used is
an error of one line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from esm_neuron.errors import DataError
from esm_neuron.files import parse_json

Records = list[tuple[str, str]]
"""(id, sequence) of each protein."""
LINES = "application/jsonlines"


def read_request(body: str | bytes, content_type: str) -> Records:
    """Return (id, sequence) of each protein of a request.

    Raises:
        DataError: the request does not have one of the forms above.
    """
    try:
        text = body.decode("utf-8") if isinstance(body, bytes) else body
    except UnicodeDecodeError as error:
        raise DataError(f"request is not UTF-8 ({error.reason} at byte {error.start}); send UTF-8") from error
    kind = content_type.partition(";")[0].strip()
    if kind not in FORMS:
        raise DataError(f"content type {content_type!r}; send {', '.join(FORMS)}")
    try:
        return FORMS[kind](text)
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"request is not {EXAMPLES[kind]}: {error!r}") from error


def write_answer(rows: Sequence[dict[str, Any]], accept: str, name: str = "predictions") -> str:
    """Return rows as JSON, or one a line where `accept` asks for application/jsonlines, as batch jobs do."""
    if accept.partition(";")[0].strip() == LINES:
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    return json.dumps({name: rows}, allow_nan=False)


def _json(text: str) -> Records:
    request = parse_json(text)
    if "records" in request:
        return [(str(record["id"]), _sequence(record["sequence"])) for record in _list(request["records"])]
    name = "inputs" if "inputs" in request else "sequences"  # the first as Hugging Face's endpoints take it
    values = request[name]
    values = [values] if name == "inputs" and isinstance(values, str) else values
    return [(str(number), _sequence(value)) for number, value in enumerate(_list(values))]


def _json_lines(text: str) -> Records:
    rows = [parse_json(line) for line in text.splitlines() if line.strip()]
    names = ["sequence" if "sequence" in row else "inputs" for row in rows]
    pairs = enumerate(zip(rows, names, strict=True))
    return [(str(row.get("id", number)), _sequence(row[name])) for number, (row, name) in pairs]


def _csv(text: str) -> Records:
    rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError("rows of several lengths" if rows else "no rows")
    head = [name.strip().lower() for name in rows[0]]
    if "sequence" in head:
        place, named = head.index("sequence"), head.index("id") if "id" in head else None
        rows = rows[1:]
    elif len(head) <= 2:
        place, named = len(head) - 1, 0 if len(head) == 2 else None
    else:
        raise ValueError(f"{len(head)} columns, none of them called sequence")
    return [(str(number) if named is None else row[named], row[place]) for number, row in enumerate(rows)]


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


FORMS: dict[str, Callable[[str], Records]] = {
    "application/json": _json,
    LINES: _json_lines,
    "text/csv": _csv,
    "text/plain": _fasta,
}
"""Content type -> reader of such a body."""
EXAMPLES = {
    "application/json": '{"records": [{"id": "P1", "sequence": "MKT"}]}, {"sequences": ["MKT"]} or {"inputs": "MKT"}',
    LINES: '{"id": "P1", "sequence": "MKT"} or {"inputs": "MKT"} on each line',
    "text/csv": "a sequence, or an id and a sequence, on each line; or columns under a header with `sequence`",
    "text/plain": "FASTA",
}
"""Content type -> what such a body looks like."""
