"""What it costs to work past one machine. One sub-command per claim:

    .venv/bin/python benchmarks/scale.py traffic --scratch runs/traffic [--seeds 3] [--examples 600]
    .venv/bin/python benchmarks/scale.py store [--contributions 64 512] [--runs 3]
    .venv/bin/python benchmarks/scale.py rates [--contributions 8] [--runs 3]
    .venv/bin/python benchmarks/scale.py ray [--contributions 4] [--runs 3]
    .venv/bin/python benchmarks/scale.py plan

`traffic`: bytes of tensors per contribution in every encoding of `finetune --send`, and what the linear probes of the model
fused from them say, on the demo's base and suite. Contributions are trained once per seed as a whole and once as adapters; the
differences are made from the whole ones, and the first seed's by `finetune --send`, too: their bytes must be the same. Resumable:
what is complete in --scratch is not repeated. The others are described in scale_store.py, scale_rates.py, scale_ray.py and
scale_plan.py. All print Markdown and assert nothing about time.
"""

import argparse
import json
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_plan import plan
from scale_rates import rates
from scale_ray import ray
from scale_store import store

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "configs" / "demo.toml"
BASE = ROOT / "assets" / "demo" / "base"
DIFFERENCES = ("delta-bf16", "delta-int8")
SENT = ("full", *DIFFERENCES, "lora")
AIMS = {"full": "", "delta-bf16": "at most 50 %", "delta-int8": "at most 26 %", "lora": "at most 5 %"}


def main() -> None:
    """Run the sub-command that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("traffic", help="bytes per contribution, and what the fused model loses by them")
    command.add_argument("--scratch", type=Path, required=True)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--examples", type=int, default=600, help="training examples of each contribution")
    command.set_defaults(run=traffic)
    command = commands.add_parser("store", help="small contributions from an S3 server, beside downloading them")
    command.add_argument("--contributions", type=int, nargs="+", default=[64, 512])
    command.add_argument("--runs", type=int, default=3)
    command.add_argument("--scratch", type=Path, help="where to work (5 GB)")
    command.set_defaults(run=store)
    command = commands.add_parser("rates", help="time of a fuse per contribution and parameter, by encoding")
    command.add_argument("--contributions", type=int, default=8)
    command.add_argument("--runs", type=int, default=3)
    command.add_argument("--scratch", type=Path, help="where to work (2 GB)")
    command.set_defaults(run=rates)
    command = commands.add_parser("ray", help="the demo's evaluation and a large fuse on one Ray worker, and on two")
    command.add_argument("--contributions", type=int, default=4, help="of the fuse, 0.5 GB each")
    command.add_argument("--runs", type=int, default=3)
    command.add_argument("--scratch", type=Path, help="where to work (3 GB)")
    command.set_defaults(run=ray)
    command = commands.add_parser("plan", help="what iterations cost beyond these machines, computed from the others")
    command.add_argument("--each", type=float, default=8.0, help="milliseconds per contribution, whatever its size")
    command.set_defaults(run=plan)
    options = parser.parse_args()
    print(options.run(options))


def traffic(options: argparse.Namespace) -> str:
    """Finetune, encode, fuse and probe once per seed, and say it in Markdown."""
    scores: dict[str, list[float]] = {"base": []}
    sizes: dict[str, list[int]] = {}
    for seed in range(options.seeds):
        place = options.scratch / f"seed-{seed}"
        for send in SENT:
            folder = place / send
            if send in DIFFERENCES and seed:
                _derive(place / "full", folder, send)
            else:
                coldctl("finetune", "--suite", SUITE, "--base", BASE, "--output", folder, "--send", send, "--seed", seed,
                        "--max-train-examples", options.examples, "--jobs", 2)  # fmt: skip
            if send in DIFFERENCES and not seed:
                _derive(place / "full", place / f"{send}-derived", send)
                _compare(folder, place / f"{send}-derived")
            sizes.setdefault(send, []).extend(tensor_bytes(child) for child in _contributions(folder))
            coldctl("fuse", folder, "--base", BASE, "--output", place / "fused" / send)
        models = [place / "fused" / send for send in SENT]
        evaluation = place / "evaluation"
        coldctl("evaluate", *models, "--baseline", BASE, "--suite", SUITE, "--output", evaluation, "--jobs", 2)
        found = json.loads((evaluation / "results.json").read_text())["averages"]
        for entry in found:
            if entry["group"] == "all":
                scores.setdefault(entry["model"], []).append(entry["mean"])
        scores["base"].append(next(entry["baseline_mean"] for entry in found if entry["group"] == "all"))
    return _traffic_report(options, sizes, scores)


def _traffic_report(options: argparse.Namespace, sizes: dict[str, list[int]], scores: dict[str, list[float]]) -> str:
    whole = statistics.mean(sizes["full"])
    lines = [
        f"- {options.examples} training examples of each of the demo's three contributors, seeds 0 to {options.seeds - 1}",
        f"- linear probes, mean over the demo's four datasets; the base model has {scores['base'][0]:.2f}",
        "",
        "| `--send` | bytes of tensors | of full | aim | fused model, by seed | mean | to full, by seed |",
        "| --- | --: | --: | --- | --- | --: | --- |",
    ]
    for send in SENT:
        size = statistics.mean(sizes[send])
        differences = [one - other for one, other in zip(scores[send], scores["full"], strict=True)]
        away = "" if send == "full" else ", ".join(f"{value:+.2f}" for value in differences)
        by_seed = ", ".join(f"{value:.2f}" for value in scores[send])
        lines.append(
            f"| {send} | {size:,.0f} | {100 * size / whole:.2f} % | {AIMS[send]} | {by_seed} | "
            f"{statistics.mean(scores[send]):.2f} | {away} |"
        )
    return "\n".join(lines)


def tensor_bytes(contribution: Path) -> int:
    """Bytes of the tensors in the weight files of a contribution."""
    total = 0
    for path in sorted(contribution.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        total += max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return total


def _contributions(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _derive(whole: Path, folder: Path, send: str) -> None:
    """The contributions of `whole` as differences: what `finetune --send` writes of the same training."""
    from coldctl.artifacts import manifest
    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.checkpoints.deltas import open_delta, write_delta
    from coldctl.checkpoints.digests import body_digest
    from coldctl.storage.local import LocalFolder

    base = open_checkpoint(LocalFolder(BASE), "base")
    for contribution in _contributions(whole):
        target = folder / contribution.name
        if (target / "coldctl.json").is_file():
            continue
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        write_delta(open_checkpoint(LocalFolder(contribution), contribution.name), base, target, send)
        document: Any = manifest.read(contribution)
        document.pop("outside_body")
        document["encoding"] = send
        document["body_digest"] = body_digest(open_delta(LocalFolder(target), contribution.name, base, send))
        manifest.write(target, document)


def _compare(one: Path, other: Path) -> None:
    """What was sent and what was derived must be the same bytes."""
    for contribution in _contributions(one):
        pair = [(folder / contribution.name / "delta.safetensors").read_bytes() for folder in (one, other)]
        if pair[0] != pair[1]:
            sys.exit(f"{contribution} is not what its whole training makes of it")


def coldctl(*arguments: object) -> None:
    """Run a command of ours; its errors go to the screen and end the program."""
    command: Sequence[str] = [sys.executable, "-m", "coldctl", *map(str, arguments), "--quiet"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
