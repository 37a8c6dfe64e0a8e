"""`accelerate launch`, which takes as long to start as it is like torchrun."""

from collections.abc import Callable
from pathlib import Path

import test_finetune

from conftest import Ran


def test_several_processes_take_the_steps_of_one(tmp_path: Path, coldctl: Callable[..., Ran]) -> None:
    test_finetune.test_several_processes_take_the_steps_of_one("accelerate", tmp_path, coldctl)
