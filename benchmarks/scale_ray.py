"""`scale.py ray`: the demo's evaluation and a large fuse on one Ray worker of one core, and on two.

The workers are nodes of a real cluster on this machine, each bound to a core of its own; the head runs no jobs. What is
measured is the whole command, from start to end, with an empty cache of features. The fuse is of `--contributions`
checkpoints of roberta-base's size with manifests, beside `--engine local` on both cores. Prints Markdown.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fuse as large

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "demo" / "base"
SUITE = ROOT / "configs" / "demo.toml"
AIMS = {"evaluate the demo": "at least 1.6"}


def ray(options: argparse.Namespace) -> str:
    """Measure both by turns, and say it in Markdown."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.scratch) as name:
        scratch = Path(name)
        model, base, contributions = scratch / "model", scratch / "base", scratch / "contributions"
        coldctl("finetune", ROOT / "assets" / "demo" / "tweets", "--base", BASE, "--output", model, "--epochs", 1,
                "--max-train-examples", 64)  # fmt: skip
        make = (sys.executable, __file__, name, str(options.contributions))  # this process stays small
        subprocess.run(make, check=True)
        commands: dict[str, tuple[object, ...]] = {
            "evaluate the demo": ("evaluate", model, "--baseline", BASE, "--suite", SUITE, "--threads", 1),
            f"fuse {options.contributions} × 0.5 GB": ("fuse", contributions, "--base", base),
        }
        taken: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.runs):
            for workers in (1, 2):
                for what, command in commands.items():
                    with cluster(workers, scratch / "cache") as address:
                        where = ("--engine", "ray", "--ray-address", address)
                        taken.setdefault((what, f"{workers}"), []).append(timed(scratch, *command, *where))
            for what, command in commands.items():
                os.environ["COLDCTL_CACHE"] = str(scratch / "cache")
                taken.setdefault((what, "local"), []).append(timed(scratch, *command))
                shutil.rmtree(scratch / "cache", ignore_errors=True)
    lines = [
        f"- {len(os.sched_getaffinity(0))} cores; medians of {options.runs}, in seconds of the whole command",
        "",
        "| | one worker | two workers | ratio | aim | `--engine local` |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for what in commands:
        one, two, local = (statistics.median(taken[what, key]) for key in ("1", "2", "local"))
        lines.append(f"| {what} | {one:.1f} | {two:.1f} | {one / two:.2f} | {AIMS.get(what, '')} | {local:.1f} |")
    return "\n".join(lines)


@contextmanager
def cluster(workers: int, cache: Path) -> Iterator[str]:
    """A cluster whose head runs nothing and whose workers have one core each. Gives its address."""
    from ray.cluster_utils import Cluster

    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", COLDCTL_CACHE=str(cache))
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for core in sorted(os.sched_getaffinity(0))[:workers]:
            bind(started.add_node(num_cpus=1), core)
        yield started.address
    finally:
        started.shutdown()
        shutil.rmtree(cache, ignore_errors=True)


def bind(node: Any, core: int) -> None:
    """Bind a node's daemon to a core, and with it the workers that it will start."""
    (process,) = node.all_processes["raylet"]
    for thread in Path(f"/proc/{process.process.pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def timed(scratch: Path, *arguments: object) -> float:
    """Seconds of one command, whose output is removed."""
    started = time.perf_counter()
    coldctl(*arguments, "--output", scratch / "out")
    seconds = time.perf_counter() - started
    shutil.rmtree(scratch / "out")
    return seconds


def coldctl(*arguments: object) -> None:
    """Run this environment's `coldctl`."""
    subprocess.run([sys.executable, "-m", "coldctl", *map(str, arguments), "--quiet"], check=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    large.make_family(place / "base", place / "plain", large.LARGE, int(sys.argv[2]))
    large.sign(place / "base", place / "plain", place / "contributions")
