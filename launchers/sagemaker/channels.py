"""What a channel of a job holds: the launcher asks before it uploads a folder, the container when it has it."""

from __future__ import annotations

from pathlib import Path

from esm_neuron.data.records import files_of
from esm_neuron.errors import ConfigError

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
