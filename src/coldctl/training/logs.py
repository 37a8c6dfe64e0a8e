"""Training logs: JSON lines, TensorBoard, or Weights & Biases.

Logs hold times and, for some tools, the machine's name, so they never go into a contribution.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from coldctl.common.errors import ConfigError

KINDS = ("jsonl", "tensorboard", "wandb")


class Log(Protocol):
    """A log of numbers by step."""

    def begin(self, step: int) -> None:
        """Start after `step`, 0 unless a training resumes. Drops records of later steps."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`."""

    def close(self) -> None:
        """Write buffered records and close the log."""


def open_log(kind: str, folder: Path, name: str, config: Mapping[str, Any]) -> Log:
    """Return the log of one training, below `folder`. Raises ConfigError if its library is missing or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "jsonl":
            return _Lines(folder / f"{name}.jsonl")
        return _TensorBoard(folder / name) if kind == "tensorboard" else _WeightsAndBiases(folder, name, config)
    except OSError as error:
        raise ConfigError(f"cannot write a log to {folder}: {error.strerror}: give another --log-folder") from None


def check_kind(kind: str) -> None:
    """Raise ConfigError for an unknown kind of log, or one whose library is missing."""
    if kind not in KINDS:
        raise ConfigError(f"--log {kind} is not known: choose one of {', '.join(KINDS)}")
    if kind == "tensorboard":
        _TensorBoard.library()
    elif kind == "wandb":
        _WeightsAndBiases.library()


class _Lines:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a+", encoding="utf-8")

    def begin(self, step: int) -> None:
        self._file.seek(0)
        kept = [line for line in self._file if line.endswith("\n") and 0 < json.loads(line)["step"] <= step]
        self._file.truncate(0)
        self._file.writelines(kept)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    @staticmethod
    def library() -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("--log tensorboard needs its library: pip install 'coldctl[log]'") from None
        return SummaryWriter

    def begin(self, step: int) -> None:
        self._writer = self.library()(str(self._folder), purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._options = {"project": "coldctl", "name": name, "dir": str(folder), "config": dict(config)}
        self._run: Any = None

    @staticmethod
    def library() -> Any:
        try:
            import wandb
        except ImportError:
            raise ConfigError("--log wandb needs its library: pip install wandb") from None
        return wandb

    def begin(self, step: int) -> None:  # noqa: ARG002  a training that resumes is another run there
        self._run = self.library().init(**self._options)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
