"""What can go wrong, in three kinds. The CLI prints each as one line and exits with its code; all else is a bug."""

from __future__ import annotations


class EsmNeuronError(Exception):
    """An error with a message meant for the person at the keyboard: the value, the limit and the cure."""

    exit_code = 1


class ConfigError(EsmNeuronError):
    """A setting, a flag or a combination of them that cannot work."""

    exit_code = 2


class DataError(EsmNeuronError):
    """A record that cannot be used: the message names file, line or record, and column."""

    exit_code = 2


class TrainingError(EsmNeuronError):
    """Training that cannot go on, such as a loss that is no number."""


class CheckpointError(EsmNeuronError):
    """A checkpoint or weight file that is damaged, incomplete or belongs to another run."""

    exit_code = 2
