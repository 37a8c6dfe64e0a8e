"""The examples are what they claim to be: files that Ray, the shell and `coldctl` accept."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from coldctl.cli.app import app

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*") if path.suffix in (".sh", ".sbatch"))


def test_ray_accepts_the_cluster(tmp_path: Path) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((EXAMPLES / "ray-cluster" / "cluster.yaml").read_text())
    prepared = util.prepare_config(config)
    util.validate_config(prepared)
    assert prepared["max_workers"] == 2
    commands = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    starts = [shlex.split(command) for command in commands if " start " in command]
    ray = pytest.importorskip("ray.scripts.scripts").start
    known = {name for option in ray.params for name in option.opts}
    for words in starts:
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags
        assert flags <= known


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_their_flags_exist(script: Path) -> None:
    shell = "bash" if script.read_text().startswith("#!/bin/bash") else "sh"
    subprocess.run([shell, "-n", script], check=True)
    commands: Any = typer.main.get_command(app)
    for name, flags in calls(script.read_text()):
        known = {option for parameter in commands.commands[name].params for option in parameter.opts}
        assert flags <= known, (name, flags - known)


def test_every_stage_is_called_somewhere() -> None:
    """So that the pattern which finds calls cannot silently find none."""
    called: dict[str, set[str]] = {script.parent.name: set() for script in SCRIPTS}
    for script in SCRIPTS:
        called[script.parent.name] |= {name for name, _ in calls(script.read_text())}
    stages = {"plan", "status", "finetune", "fuse", "evaluate", "promote"}
    assert called == {"ray-cluster": stages, "slurm": stages}


def calls(text: str) -> list[tuple[str, set[str]]]:
    """The commands of `coldctl` that a shell script calls, each with the long flags it gives them."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    inner = re.findall(r"\$\(([^()]*)\)", "\n".join(lines))
    found = re.findall(r"coldctl (\w+)(.*)", "\n".join([re.sub(r"\$\([^()]*\)", "…", line) for line in lines] + inner))
    return [(name, set(re.findall(r"(?<!\S)--[a-z-]+", arguments))) for name, arguments in found]
