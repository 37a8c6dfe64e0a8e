"""The examples in docstrings say what the functions really return."""

import doctest
import importlib
from pathlib import Path

import pytest

import coldctl

ROOT = Path(coldctl.__file__).parent
MODULES = [
    ".".join(("coldctl", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed


def test_there_are_examples() -> None:
    assert len(MODULES) > 5
