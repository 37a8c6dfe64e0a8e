"""The shell itself: help, imports, JSON, versions, configs that ship."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from coldctl.checkpoints.architectures import BODY_PREFIXES
from coldctl.config import loading
from coldctl.config.settings import EvaluateConfig, FinetuneConfig, FuseConfig, PublishConfig, RunConfig
from conftest import Ran

ROOT = Path(__file__).parents[2]
COMMANDS = ("finetune", "fuse", "evaluate", "publish", "check", "lineage", "status", "plan", "promote")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, coldctl: Callable[..., Ran]) -> None:
    ran = coldctl(command, "--help")
    assert ran.code == 0
    assert f"Example: coldctl {command}" in ran.stdout


@pytest.mark.parametrize("arguments", ["--help", "fuse --help", "fuse", "check", "lineage", "status", "plan"])
def test_light_commands_import_no_torch(arguments: str, tmp_path: Path, base: Path, contributions: Path) -> None:
    fused = tmp_path / "fused"
    fuse = ["fuse", str(contributions), "--base", str(base), "--output", str(fused)]
    run = tmp_path / "run"
    (tmp_path / "c.toml").write_text(f'[run]\nbase = "{base}"\n')
    plan = ["plan", str(run), "--config", str(tmp_path / "c.toml")]
    before = {"lineage": fuse, "status": plan}.get(arguments)
    line = {
        "fuse": fuse,
        "check": ["check", str(contributions), "--base", str(base)],
        "lineage": ["lineage", str(fused)],
        "status": ["status", str(run)],
        "plan": plan,
    }.get(arguments, arguments.split())
    code = (
        "import sys\nfrom coldctl.cli.app import app\n"
        "def go(line):\n    try: app(line, standalone_mode=False)\n    except SystemExit as e: assert not e.code, e\n"
        f"go({before!r}) if {before!r} else None\ngo({line!r})\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'pandas', 'datasets', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version_and_module_entry() -> None:
    done = subprocess.run([sys.executable, "-m", "coldctl", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("coldctl ")
    done = subprocess.run(
        [sys.executable, "-m", "coldctl", "status", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error:")


def test_json_is_the_only_thing_on_stdout(
    tmp_path: Path, base: Path, contributions: Path, coldctl: Callable[..., Ran]
) -> None:
    ran = coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "fused", "--json", "--quiet")
    assert json.loads(ran.stdout)["kind"] == "fused"
    assert ran.stderr == ""
    ran = coldctl("fuse", tmp_path / "none", "--base", base, "--output", tmp_path / "x", "--json")
    assert ran.code == 2
    assert ran.json["exit_code"] == 2


def test_what_is_reported_after_its_end_draws_nothing() -> None:
    from coldctl.api.bars import _Bars

    drawn = Progress(console=Console(file=io.StringIO()))
    bars = _Bars(drawn)
    bars.begin("work", 3, "steps")
    bars.advance("work", 1)
    assert [task.completed for task in drawn.tasks] == [1]
    bars.end("work")
    bars.advance("work", 1)  # of a job that goes on a moment longer than its stage
    bars.end("work")
    assert not drawn.tasks


def test_a_reader_that_leaves_and_a_place_that_cannot_be(
    tmp_path: Path, base: Path, coldctl: Callable[..., Ran]
) -> None:
    (tmp_path / "c.toml").write_text(f'[run]\nbase = "{base}"\n')
    assert coldctl("plan", tmp_path / "run", "--config", tmp_path / "c.toml").code == 0
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-u", "-m", "coldctl", "status", str(tmp_path / "run"), "--json"]
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr


def test_shipped_configs_parse() -> None:
    demo = loading.read(ROOT / "configs/demo.toml")
    assert [dataset.role for dataset in demo.datasets].count("unseen") == 1
    recycling = loading.read(ROOT / "configs/model-recycling.toml")
    assert len(recycling.datasets) == 36
    assert {dataset.metric for dataset in recycling.datasets if dataset.name == "stsb"} == {"spearman"}
    for file in (demo, recycling):
        for kind in (
            RunConfig,
            FinetuneConfig,
            FuseConfig,
            EvaluateConfig,
            PublishConfig,
        ):
            loading.resolve(kind, file, {})
    assert loading.resolve(RunConfig, recycling, {}).base == "roberta-base"
    assert all(dataset.path.startswith("hf:") for dataset in recycling.datasets)


def test_prefixes_are_those_of_transformers() -> None:
    import transformers
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for kind, prefix in BODY_PREFIXES.items():
        if kind in names:  # older versions know fewer
            assert getattr(transformers, names[kind]).base_model_prefix == prefix, kind


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_every_command(command: str, coldctl: Callable[..., Ran]) -> None:
    """One set of flags for all commands: what is missing is an argument, never an unknown option."""
    flags = ("--config", "none.toml", "--seed", 1, "--jobs", 1, "--engine", "local", "--json", "--quiet", "--overwrite")
    ran = coldctl(command, *flags)
    assert ran.code == 2
    assert "No such option" not in ran.stderr
