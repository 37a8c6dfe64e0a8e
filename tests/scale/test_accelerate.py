"""`accelerate launch`, which takes as long to start as it is like torchrun."""

from collections.abc import Callable
from pathlib import Path

from conftest import Ran
from helpers.training import check_processes_take_the_steps_of_one


def test_several_processes_take_the_steps_of_one(tmp_path: Path, coldctl: Callable[..., Ran]) -> None:
    check_processes_take_the_steps_of_one("accelerate", tmp_path, coldctl)
