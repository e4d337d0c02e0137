"""docs/errors.md is what the code says of malformed files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from malformed import CASES, INTRODUCTION, Malformed, error_of

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_page_has_the_line_that_refuses_a_file(case: Malformed) -> None:
    found = re.search(
        rf"^{re.escape(case.title)} \(`{re.escape(case.name)}`\)\n```\n(.*?)\n```$", PAGE, re.DOTALL | re.M
    )
    assert found is not None
    # versions of libraries and of Python word what stands in parentheses in their own way
    assert re.sub(r"\(.*\)", "()", error_of(case)) == re.sub(r"\(.*\)", "()", found[1])


def test_the_page_has_no_other_file() -> None:
    assert PAGE.startswith(INTRODUCTION)
    assert PAGE.count("\n```\n\n") + 1 == len(CASES) >= 30
