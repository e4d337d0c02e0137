"""docs/errors.md is what the code says of malformed files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from malformed import CASES, INTRODUCTION, Malformed, error_of

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")


def ours(message: str) -> str:
    """A message without parentheses: versions of libraries and of Python word what stands there in their own way."""
    while (inner := re.sub(r"\([^()]*\)", "", message)) != message:
        message = inner
    return message


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_page_has_the_line_that_refuses_a_file(case: Malformed) -> None:
    found = re.search(
        rf"^{re.escape(case.title)} \(`{re.escape(case.name)}`\)\n```\n(.*?)\n```$", PAGE, re.DOTALL | re.M
    )
    assert found is not None
    assert ours(error_of(case)) == ours(found[1])


def test_the_page_has_no_other_file() -> None:
    assert PAGE.startswith(INTRODUCTION)
    assert PAGE.count("\n```\n\n") + 1 == len(CASES) >= 30
