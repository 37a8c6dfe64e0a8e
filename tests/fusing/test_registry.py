"""The registry of merge methods: what it adds to the command line, the checks and the docs."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from coldctl.common.errors import ConfigError
from coldctl.fusing.blocks import Array, Block
from coldctl.fusing.methods import METHODS, find_method, mean, register
from coldctl.fusing.recipe import Method, Recipe
from conftest import Ran
from helpers.bodies import body

ROOT = Path(__file__).parents[2]
Run = Callable[..., Ran]


def largest(block: Block, recipe: Recipe) -> Array:
    """Return the largest value of each element."""
    return np.asarray(np.max([part.astype(np.float64) for part in block.contributions], axis=0))


@pytest.fixture
def registered() -> Iterator[Method]:
    method = register(Method("largest", "largest value", "none", largest, takes_weights=False))
    yield method
    del METHODS[method.name]


@pytest.mark.usefixtures("registered")
def test_fuse_takes_a_method_registered_at_run_time(
    tmp_path: Path, base: Path, contributions: Path, coldctl: Run
) -> None:
    command = ("fuse", contributions, "--base", base, "--method", "largest", "--output")
    ran = coldctl(*command, tmp_path / "fused")
    assert ran.code == 0, ran.stderr
    parts = [body(child) for child in sorted(contributions.iterdir())]
    for name, value in body(tmp_path / "fused").items():
        np.testing.assert_array_equal(value, np.max([part[name] for part in parts], axis=0))
    ran = coldctl(*command, tmp_path / "weighted", "--weights", "examples")
    assert (ran.code, "largest takes no --weights" in ran.stderr) == (2, True)
    assert "largest: largest value" in " ".join(coldctl("fuse", "--help").stdout.split())


def test_register_refuses_a_name_that_is_taken() -> None:
    with pytest.raises(ConfigError, match="mean is already a merge method"):
        register(Method("mean", "another", "none", lambda block, recipe: mean(block.contributions)))


def test_find_method_names_the_nearest_method() -> None:
    with pytest.raises(ConfigError, match="'tise' is not known, did you mean 'ties'"):
        find_method("tise")


def test_the_table_of_methods_in_the_docs_is_current(tmp_path: Path) -> None:
    page = Path(shutil.copy(ROOT / "docs/fusing.md", tmp_path / "fusing.md"))
    subprocess.run([sys.executable, str(ROOT / "scripts/method_table.py"), str(page)], check=True)
    assert page.read_text() == (ROOT / "docs/fusing.md").read_text(), "run `make reference`"
