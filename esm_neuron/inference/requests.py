"""Requests to an endpoint and their answers: what `esm-neuron serve` and the handler of SageMaker share.

Requests: application/json `{"records": [{"id": "P1", "sequence": "MKT..."}]}`, `{"sequences": ["MKT..."]}` or
`{"inputs": "MKT..."}` (also a list); application/jsonlines with `id` and `sequence`, or `inputs`, on each line;
text/csv; FASTA as text/plain, or a sequence on each line. The response is JSON, `{"predictions": [{"id": "P1", "label":
"membrane", ...}]}`, or a prediction a line where application/jsonlines is asked for, in the order of the request, with
the columns of `esm-neuron predict`; null where there is no value, as for residues that were cut off. A request that
cannot be used is an error of one line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from esm_neuron.data.records import ALSO
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
    except (ValueError, csv.Error) as error:
        raise DataError(f"request: {error}; send {EXAMPLES[kind]}") from error


def write_answer(rows: Sequence[dict[str, Any]], accept: str, name: str = "predictions") -> str:
    """Return rows as JSON, or one a line where `accept` asks for application/jsonlines, as batch jobs do."""
    if accept.partition(";")[0].strip() == LINES:
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    return json.dumps({name: rows}, allow_nan=False)


def _json(text: str) -> Records:
    request = _object(parse_json(text))
    given = [name for name in ("records", "sequences", "inputs") if name in request]
    if len(given) != 1:
        raise ValueError(f"it has {' and '.join(given) or 'none of these'}")
    values = request[given[0]]
    if given == ["inputs"] and isinstance(values, str):  # as Hugging Face's endpoints take it
        values = [values]
    if not isinstance(values, list):
        raise ValueError(f"{given[0]} is {type(values).__name__}, not a list")
    if given == ["records"]:
        return [(_name(_field(record, "id")), _sequence(_field(record, "sequence"))) for record in values]
    return [(str(number), _sequence(value)) for number, value in enumerate(values)]


def _json_lines(text: str) -> Records:
    rows = [_object(parse_json(line)) for line in text.splitlines() if line.strip()]
    return [
        (_name(row.get("id", number)), _sequence(_field(row, "sequence" if "sequence" in row else "inputs")))
        for number, row in enumerate(rows)
    ]


def _csv(text: str) -> Records:
    rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError("rows of several lengths" if rows else "no rows")
    head = [name.strip().lower() for name in rows[0]]
    if "sequence" in head:
        place = head.index("sequence")
        named = next((head.index(name) for name in ("id", *ALSO["id"]) if name in head), None)
        rows = rows[1:]
    elif len(head) <= 2:
        place, named = len(head) - 1, 0 if len(head) == 2 else None
    else:
        raise ValueError(f"{len(head)} columns, none of them called sequence")
    return [(str(number) if named is None else row[named], row[place]) for number, row in enumerate(rows)]


def _fasta(text: str) -> Records:
    before, *records = ("\n" + text).split("\n>")
    if not records:
        return [(str(number), line.strip()) for number, line in enumerate(filter(str.strip, text.splitlines()))]
    if before.strip():
        raise DataError("request is not FASTA; begin each record with a line >ID")
    parts = [record.partition("\n") for record in records]
    return [(header.split()[0] if header.split() else "", "".join(body.split())) for header, _, body in parts]


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where an object belongs")
    return value


def _field(record: Any, name: str) -> Any:
    if name not in _object(record):
        raise ValueError(f"a record has no {name}")
    return record[name]


def _name(value: Any) -> str:
    if type(value) not in (str, int):  # a bool is an int too
        raise ValueError(f"an id is {type(value).__name__}, neither text nor a whole number")
    return str(value)


def _sequence(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a sequence is {type(value).__name__}, not text")
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
    "text/plain": "FASTA, or a sequence on each line",
}
"""Content type -> what such a body looks like."""
