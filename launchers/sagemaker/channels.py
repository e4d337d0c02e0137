"""What a channel of a job holds: the launcher asks before it uploads a folder, the container when it has it."""

from __future__ import annotations

from pathlib import Path

from esm_neuron.data.records import files_of
from esm_neuron.errors import ConfigError
from esm_neuron.files import read_json
from esm_neuron.models.adapter_folder import is_adapter, read_adapter_folder
from esm_neuron.models.shapes import SHAPES, EsmShape, known_shape

SAVED = {"dataset_info.json", "dataset_dict.json"}
"""One of these lies in a folder that `save_to_disk` wrote."""


def source_in(split: str, folder: Path, named: str | None) -> Path:
    """Return the source of records in a channel's folder.

    That is what has the name of the config's own source; else a dataset of `save_to_disk` (one split or several), also
    one folder below; else the only file of a table, or the folder of several of one kind.

    Raises:
        ConfigError: it holds nothing that can be read.
        DataError: it holds files of several kinds, or of several splits.
    """
    entries = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    wanted = [path for path in entries if named is not None and path.name == Path(named).name]
    if wanted:
        return wanted[0]
    if SAVED & {path.name for path in entries}:
        return folder
    if len(entries) == 1:
        return source_in(split, entries[0], named) if entries[0].is_dir() else entries[0]
    files = [Path(file) for file, _ in files_of(str(folder))]
    if files == [folder]:
        held = ", ".join(path.name for path in entries[:8]) or "nothing"
        cure = "put one file there, files of one kind, or a folder that save_to_disk wrote"
        raise ConfigError(f"channel {split} holds {held}; {cure}, or name one of them: data.{split}={named}")
    return files[0] if len(files) == 1 else folder


SHAPE = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
}  # fmt: skip
"""What a shape has -> what config.json calls it."""


def shape_in(model: str) -> EsmShape | None:
    """Return the shape of a model by its name, or as the files of its folder say; None where it is not known here.

    Needs no torch, unlike the reading of weights, which looks at the other fields in the container.

    Raises:
        ConfigError: the folder is not that of an ESM-2.
    """
    folder = Path(model)
    if model in SHAPES or not folder.is_dir():
        return known_shape(model)
    if is_adapter(folder) and not (folder / "config.json").is_file():
        base = read_adapter_folder(folder).base
        return None if base is None else shape_in(base)
    form = {"model_type": lambda name: name in ("esm", "esm_neuron")}
    form |= dict.fromkeys(SHAPE.values(), lambda number: type(number) is int and number > 0)
    said = read_json(folder / "config.json", form, ConfigError, "give the Hugging Face folder of an ESM-2")
    return EsmShape(**{ours: said[name] for ours, name in SHAPE.items()})
