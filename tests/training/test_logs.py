"""Logs of a training: as JSON lines, for TensorBoard and for Weights & Biases."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import FAST, Ran

Run = Callable[..., Ran]


def test_logs_stand_outside_the_contribution(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "warm.toml").write_text("[finetune]\nwarmup = 0.7\n")
    ran = coldctl("finetune", dataset, "--base", base, "--output", "out", "--name", "mine", "--log", "jsonl", *FAST,
                  "--config", "warm.toml")  # fmt: skip
    assert ran.code == 0, ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "coldctl-logs" / "mine.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1
    assert lines[0]["learning_rate"] == pytest.approx(1e-3 / 2)  # of three steps two lead up to it
    assert {"loss", "learning_rate", "validation", "test"} <= {key for line in lines for key in line}
    assert not list((tmp_path / "out").rglob("*log*"))
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    ran = coldctl("finetune", dataset, "--base", base, "--output", "no", "--log", "paper", *FAST)
    assert ran.code == 2
    assert "jsonl, tensorboard, wandb" in ran.stderr


class Recorder:
    """Stands in for the libraries of TensorBoard and of Weights & Biases, and keeps what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def SummaryWriter(self, folder: str, purge_step: int) -> "Recorder":  # noqa: N802  their name
        self.told.append(("begin", folder, purge_step))
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def close(self) -> None:
        self.told.append(("end",))

    def init(self, **options: Any) -> "Recorder":
        self.told.append(("begin", options["dir"], options["name"], options["config"]["batch_size"]))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.told += [(name, value, step) for name, value in values.items()]

    finish = close


@pytest.mark.parametrize(
    ("kind", "library", "remedy"),
    [("tensorboard", "torch.utils.tensorboard", "'coldctl[log]'"), ("wandb", "wandb", "pip install wandb")],
)
def test_logs_of_other_libraries(
    kind: str, library: str, remedy: str, tmp_path: Path, base: Path, dataset: Path, coldctl: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--name", "mine", *FAST, "--jobs", 1,
               "--log", kind, "--log-folder", tmp_path / "logs")  # fmt: skip
    monkeypatch.setitem(sys.modules, library, None)
    ran = coldctl(*command)
    assert ran.code == 2
    assert remedy in ran.stderr
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, library, recorder)
    odd = shutil.copytree(base, tmp_path / "odd")  # what cannot be trained leaves no log
    tokenizer = json.loads((odd / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["the"] = 99_999
    (odd / "tokenizer.json").write_text(json.dumps(tokenizer))
    ran = coldctl(*command[:3], odd, *command[4:])
    assert ran.code == 2
    assert "gives token 99999" in ran.stderr
    assert recorder.told == []
    ran = coldctl(*command)
    assert ran.code == 0, ran.stderr
    logs = tmp_path / "logs"
    begun = (str(logs / "mine"), 1) if kind == "tensorboard" else (str(logs), "mine", 16)
    assert recorder.told[0] == ("begin", *begun)
    assert recorder.told[-1] == ("end",)
    assert {"loss", "learning_rate", "validation", "test"} <= {item[0] for item in recorder.told}
    assert max(item[2] for item in recorder.told if item[0] == "loss") <= 3


def test_a_log_ends_where_the_training_does(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    common = ("finetune", dataset, "--base", base, "--name", "mine", "--log", "jsonl", *FAST)
    for name in ("one", "two"):  # the second training begins the log anew
        ran = coldctl(*common, "--output", tmp_path / name, "--log-folder", tmp_path / "logs")
        assert ran.code == 0, ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "logs" / "mine.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert len([line for line in lines if "test" in line]) == 1
    for place, folder in (("in", tmp_path / "in" / "logs"), ("mine", tmp_path)):
        ran = coldctl(*common[:-6], *FAST, "--log", "jsonl", "--name", "mine", "--output", tmp_path / place,
                      "--log-folder", folder)  # fmt: skip
        assert ran.code == 2
        assert "--log-folder" in ran.stderr
    (tmp_path / "file").write_text("")
    ran = coldctl(*common, "--output", tmp_path / "x", "--log-folder", tmp_path / "file")
    assert ran.code == 2
    assert "--log-folder" in ran.stderr
