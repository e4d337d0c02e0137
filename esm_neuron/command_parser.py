"""argparse with the errors of this package: one line, without secrets."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn

from esm_neuron.errors import ConfigError


class CommandParser(ArgumentParser):
    """Parses the words of a command; what argparse would print and exit with is raised, for `cli.main` to say."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the words.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}; see {self.prog} --help")
