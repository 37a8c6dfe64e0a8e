"""`scale.py rates`: how long `coldctl fuse` takes per contribution and parameter, for every encoding.

The demo's base with noise, so many times, as whole checkpoints and as differences; adapters are random matrices in the
files that `finetune --send lora` writes. Each is fused as one contribution and as all of them, by turns, each a process
of its own; what the others take, divided by their number and parameters, is the rate. Prints Markdown.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fuse import measure

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "demo" / "base"
DATASET = ROOT / "assets" / "demo" / "tweets"
SENT = ("full", "delta-bf16", "delta-int8", "lora")
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def rates(options: argparse.Namespace) -> str:
    """Make contributions, fuse them by turns, and say it in Markdown."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.scratch) as name:
        scratch = Path(name)
        made = (sys.executable, __file__, name, str(options.contributions))  # this process stays small: see fuse.py
        parameters = int(subprocess.run(made, check=True, capture_output=True, text=True).stdout)
        lines = [
            f"- {options.contributions} contributions of {parameters / 1e6:.1f} M parameters, medians of {options.runs}",
            "",
            "| `--send` | one, s | all, s | ns per contribution and parameter | peak resident, MB |",
            "| --- | --: | --: | --: | --: |",
        ]
        for send in SENT:
            folders = sorted(map(str, (scratch / send).iterdir()))
            one, every, resident = [], [], []
            for _ in range(options.runs):
                one.append(_fuse(folders[:1], scratch / "fused").wall)
                sample = _fuse(folders, scratch / "fused")
                every.append(sample.wall)
                resident.append(sample.resident / 1e6)
            first, whole = statistics.median(one), statistics.median(every)
            each = (whole - first) / (len(folders) - 1) / parameters * 1e9
            lines.append(f"| {send} | {first:.2f} | {whole:.2f} | {each:.1f} | {statistics.median(resident):.0f} |")
        return "\n".join(lines)


def _fuse(folders: list[str], output: Path) -> Any:
    sample = measure(
        (sys.executable, "-m", "coldctl", "fuse", *folders, "--base", str(BASE), "--quiet", "--output", str(output))
    )
    shutil.rmtree(output)
    return sample


def _make(scratch: Path, count: int) -> int:
    """Write the contributions of every encoding. Returns the body's parameters."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.checkpoints.deltas import open_delta, write_delta
    from coldctl.checkpoints.digests import body_digest
    from coldctl.checkpoints.formats import open_contribution
    from coldctl.storage.local import LocalFolder

    base = open_checkpoint(LocalFolder(BASE), "base")
    digest = body_digest(base)
    tensors = load_file(BASE / WEIGHTS)
    adapter = _adapter(scratch)
    matrices = load_file(adapter / ADAPTER)
    drawn = np.random.default_rng(0)
    for number in range(count):
        noisy = {
            name: value + 1e-3 * drawn.standard_normal(value.shape, np.float32) if value.dtype == np.float32 else value
            for name, value in tensors.items()
        }
        name = f"contribution-{number:02d}"
        whole = scratch / "full" / name
        whole.mkdir(parents=True)
        save_file(noisy, whole / WEIGHTS, {"format": "pt"})
        shutil.copy(BASE / "config.json", whole)
        made = open_checkpoint(LocalFolder(whole), name)
        _manifest(whole, "full", body_digest(made), digest)
        for send in SENT[1:3]:
            folder = scratch / send / name
            folder.mkdir(parents=True)
            write_delta(made, base, folder, send)
            _manifest(folder, send, body_digest(open_delta(LocalFolder(folder), name, base, send)), digest)
        folder = scratch / "lora" / name
        shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("coldctl.json"))
        random = {key: 1e-2 * drawn.standard_normal(value.shape, np.float32) for key, value in matrices.items()}
        save_file(random, folder / ADAPTER, {"format": "pt"})
        _manifest(folder, "adapter", body_digest(open_contribution(LocalFolder(folder), name, base)), digest)
    return sum(tensor.size for tensor in base.body.values() if tensor.floating)


def _adapter(scratch: Path) -> Path:
    """An adapter as finetuning writes it, for its names and shapes."""
    folder = scratch / "template"
    command = [sys.executable, "-m", "coldctl", "finetune", DATASET, "--base", BASE, "--output", folder, "--send", "lora",
               "--epochs", 1, "--max-train-examples", 16, "--batch-size", 16, "--quiet"]  # fmt: skip
    subprocess.run([*map(str, command)], check=True)
    return folder


def _manifest(folder: Path, encoding: str, body: str, base: str) -> None:
    from coldctl.artifacts import manifest

    manifest.write(
        folder,
        {
            "kind": "contribution",
            "name": folder.name,
            "iteration": 1,
            "encoding": encoding,
            "body_digest": body,
            "base": {"name": "base", "body_digest": base},
            "config": {},
            "dataset": {"name": folder.name, "num_train": 100},
        },
    )


if __name__ == "__main__":
    print(_make(Path(sys.argv[1]), int(sys.argv[2])))
