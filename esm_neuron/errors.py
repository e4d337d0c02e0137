"""Errors that a user can meet. The command line prints one line and exits with its code; anything else is a bug."""

from __future__ import annotations


class EsmNeuronError(Exception):
    """An error whose message is for the user: the value, the limit and the cure."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Return what IPython and notebooks show: one line, whatever frames it passed."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(EsmNeuronError):
    """A setting, a flag or a combination of them cannot work."""

    exit_code = 2


class DataError(EsmNeuronError):
    """A record cannot be used; the message names file, line or record, and column."""

    exit_code = 2


class TrainingError(EsmNeuronError):
    """Training cannot go on, for instance because the loss is not finite."""


class CheckpointError(EsmNeuronError):
    """A checkpoint or weight file is damaged, incomplete or belongs to another run."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .")[:200] if lines else type(error).__name__
