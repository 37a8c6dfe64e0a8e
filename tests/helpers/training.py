"""Trainings without the command line, and comparisons of what they learned."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coldctl.common.progress import SILENT
from coldctl.config.settings import FinetuneConfig
from coldctl.training import model as models
from coldctl.training.batches import Examples
from coldctl.training.loop import Task, TrainingContext, predict, train
from conftest import Ran
from helpers import tiny


def without_dropout(folder: Path, probability: float = 0.0) -> Path:
    """Set every dropout probability of a checkpoint to 0 (or nearly), so that two ways to compute must agree."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in config.items():
        if "dropout" in key and isinstance(value, float):
            config[key] = probability
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def alike(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that differ by more than rounding does after some steps of AdamW.

    The bias of attention's keys is left out: its gradient is zero but for rounding, which AdamW blows up.
    """
    assert one.keys() == two.keys()
    keys = re.compile(r"\.k(ey|ey_proj|_lin)?\.bias$")
    return [
        name
        for name, value in one.items()
        if not keys.search(name) and not torch.allclose(two[name], value, rtol=2e-3, atol=2e-4)
    ]


def learn(
    base: Path, data: Path, scratch: Path, *, shortcuts: bool = True, hook: Any = None, **settings: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Train without the command line; return the weights, and the training with its predictions on the training examples."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    names = sorted({row["label"] for row in rows})
    tokenizer = models.load_tokenizer(base)
    model = models.load_classifier(base, names, 0)
    encoded = models.encode(tokenizer, [row["text"] for row in rows], None, 64)
    examples = Examples(encoded, np.array([names.index(row["label"]) for row in rows]))
    if hook is not None:
        model.register_forward_pre_hook(hook, with_kwargs=True)
    config = FinetuneConfig(**({"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 4} | settings))
    context = TrainingContext(torch.device("cpu"), tokenizer.pad_token_id, scratch, SILENT, "x", shortcuts=shortcuts)
    task = Task(model, examples, examples, lambda found: float(np.mean(found == examples.labels)) * 100)
    trained = train([task], config, context, seed=1)
    return dict(model.state_dict()), (trained, predict(model, encoded, context))


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
}


def losses(log: Path) -> dict[tuple[int, str], float]:
    """Return the learning curve that a training logged, by step and kind of loss."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {(line["step"], key): line[key] for line in lines for key in ("loss", "mean_loss") if key in line}


def check_processes_take_the_steps_of_one(launcher: str, tmp_path: Path, coldctl: Callable[..., Ran]) -> None:
    """Check that two processes have the losses, step by step, and the weights of one, at the same size of the whole batch."""
    base = without_dropout(tiny.make_base("bert", tmp_path / "base"))
    data = tiny.make_dataset(tmp_path / "data", train=37)  # the last batch of each epoch is smaller than the team
    common = ("finetune", data, "--base", base, "--name", "same", "--epochs", 2, "--batch-size", 9, "--learning-rate", 1e-3,
              "--log", "jsonl")  # fmt: skip
    assert coldctl(*common, "--output", tmp_path / "one", "--log-folder", tmp_path / "log-one", "--jobs", 1).code == 0
    launched = [sys.executable, "-m", *LAUNCHERS[launcher].split(), "-m", "--", "coldctl", *map(str, common)]
    launched += ["--output", str(tmp_path / "two"), "--log-folder", str(tmp_path / "log-two")]
    ran = subprocess.run([*launched, "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["name"] == "same"  # said once, by the process that leads
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert alike(one, two) == []
    curves = [losses(tmp_path / name / "same.jsonl") for name in ("log-one", "log-two")]
    assert len(curves[0]) > 2
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    again = subprocess.run(launched, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("left alone") == 1
