"""`scripts/experiment.py`: one run per variant, then all of them evaluated side by side."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Ran, suite_text
from helpers import tiny
from helpers.rounds import rounds, validated

ROOT = Path(__file__).parents[2]


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for PATH whose `coldctl` only notes, in the file `calls` beside it, how it was called."""
    program = tmp_path / "bin" / "coldctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    program.chmod(0o755)
    return program.parent


def experiment(file: Path, to: Path, commands: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    command: list[str | Path] = [sys.executable, ROOT / "scripts" / "experiment.py", file, "--to", to, "--jobs", "2"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_variants_run_in_turn_and_are_evaluated_together(tmp_path: Path, commands: Path) -> None:
    (tmp_path / "suite.toml").write_text(suite_text("base"))
    file, runs = tmp_path / "experiment.toml", tmp_path / "runs"
    file.write_text(
        'config = "suite.toml"\n[[variant]]\nname = "at once"\n[[variant]]\nname = "three"\niterations = 3\n'
    )
    for _ in range(2):  # the same command continues
        ran = experiment(file, runs, commands)
        assert ran.returncode == 0, ran.stderr
        lines = (tmp_path / "calls").read_text().splitlines()
        assert [line for line in lines if line.startswith("plan")] == [
            f"plan {runs}/{name} --config {runs}/{name}.toml --iterations 0 --target {count}"
            for name, count in (("at once", 1), ("three", 3))
        ]
        assert lines[-1] == (
            f"evaluate {runs}/at once {runs}/three --suite {runs}/three.toml --output {runs}/evaluation --jobs 2"
        )
        (tmp_path / "calls").unlink()
    (commands / "coldctl").write_text("#!/bin/sh\nexit 3\n")
    assert experiment(file, runs, commands).returncode == 3


def test_evaluation_compares_the_curves_of_the_variants(
    tmp_path: Path, base: Path, commands: Path, coldctl: Callable[..., Ran]
) -> None:
    shutil.copytree(base, tmp_path / "base")
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    (tmp_path / "suite.toml").write_text(suite_text("base"))
    (tmp_path / "plans").mkdir()
    file, runs = tmp_path / "plans" / "experiment.toml", tmp_path / "runs"
    file.write_text(
        'config = "../suite.toml"\niterations = 2\n[[variant]]\nname = "whole"\n'
        '[[variant]]\nname = "split"\niterations = 1\nfinetune.epochs = 2\ndataset.red.contributors = 2\n'
    )
    assert experiment(file, runs, commands).returncode == 0
    rounds(coldctl, runs / "whole", runs / "whole.toml", 2)
    rounds(coldctl, runs / "split", runs / "split.toml", 1)
    assert coldctl("plan", runs / "split", "--config", runs / "split.toml", "--target", 1).stdout == ""
    contributions = runs / "split" / "iteration-001" / "contributions"
    assert sorted(path.name for path in contributions.iterdir()) == ["green", "red-1", "red-2"]
    ran = coldctl("evaluate", runs / "whole", runs / "split", "--suite", runs / "whole.toml",
                  "--output", runs / "evaluation", "--jobs", 1)  # fmt: skip
    assert ran.code == 0, ran.stderr
    again = coldctl("evaluate", runs / "whole", runs / "split", "--suite", runs / "whole.toml",
                    "--output", runs / "evaluation", "--jobs", 1)  # fmt: skip
    assert again.code == 0, again.stderr
    assert "complete already" in again.stderr
    results = validated(runs / "evaluation")
    assert [(model["name"], model["run"], model["iteration"]) for model in results["models"]] == [
        ("whole/iteration-001", "whole", 1), ("whole/iteration-002", "whole", 2), ("split/iteration-001", "split", 1),
    ]  # fmt: skip
    assert (runs / "evaluation" / "curve.png").is_file()
    report = (runs / "evaluation" / "report.md").read_text()
    assert "| whole | 2 |" in report
    assert "| split | 1 |" in report
    file.write_text(file.read_text().replace("epochs = 2", "epochs = 3"))
    changed = experiment(file, runs, commands)
    assert changed.returncode == 2
    assert "belongs to another experiment" in changed.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no configuration to vary"),
        ('config = "none.toml"', "no configuration file"),
        ('config = "suite.toml"', "no variants"),
        ('config = "suite.toml"\n[[variant]]\nname = "a/b"', "cannot name a directory"),
        ('config = "suite.toml"\n[[variant]]\nname = "a\\u001b[2J"', "cannot name a directory"),
        ('config = "suite.toml"\n[[variant]]\nname = "a"\nfinetune.epoch = 1', "did you mean 'epochs'"),
        ('config = "suite.toml"\n[[variant]]\nname = "a"\nfinetune = 1', "[finetune] must be a table"),
        ('config = "suite.toml"\n[[variant]]\nname = "a"\ndataset.rde.contributors = 2', "no dataset 'rde'"),
        ('config = "suite.toml"\n[[variant]]\nname = "a"\ndataset.red = 2', "[variant.dataset.NAME]"),
        ('config = "suite.toml"\n[[variant]]\nname = "a"\n[[variant]]\nname = "a"', "two variants have this name"),
        ('config = "suite.toml"\niterations = 0\n[[variant]]\nname = "a"', "at least 1"),
        ('config = "suite.toml"\ndatasets = ["x"]\n[[variant]]\nname = "a"', "no dataset 'x'"),
        ('config = "suite.toml"\ndatasets = "red"\n[[variant]]\nname = "a"', "datasets = 'red' is no list"),
        (
            'config = "suite.toml"\nfuse = 3\n[[variant]]\nname = "a"\nfuse.trim = 0',
            "experiment.toml: [fuse] must be a table",
        ),
        ('config = "section.toml"\n[[variant]]\nname = "a"', "section.toml: [fuse] must be a table"),
        ('config = "table.toml"\n[[variant]]\nname = "a"', "table.toml: write each dataset as [[dataset]]"),
        ('config = "suite.toml"\n[[variant]]\nname = "evaluation"', "the folder 'evaluation' holds the comparison"),
    ],
)
def test_mistakes_in_an_experiment_are_named(tmp_path: Path, text: str, words: str, commands: Path) -> None:
    (tmp_path / "suite.toml").write_text(suite_text("base"))
    (tmp_path / "section.toml").write_text("fuse = 3")
    (tmp_path / "table.toml").write_text("dataset = 3")
    (tmp_path / "experiment.toml").write_text(text)
    ran = experiment(tmp_path / "experiment.toml", tmp_path / "runs", commands)
    assert ran.returncode == 2
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, commands: Path) -> None:
    (tmp_path / "suite.toml").write_text(suite_text("base"))
    (tmp_path / "experiment.toml").write_text('config = "suite.toml"\n[[variant]]\nname = "a"\n')
    ran = experiment(tmp_path / "experiment.toml", tmp_path / "suite.toml" / "runs", commands)
    assert ran.returncode == 2
    assert "Not a directory" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_paths_in_a_variant_mean_what_they_meant(tmp_path: Path, commands: Path) -> None:
    for name in ("red", "keys"):
        (tmp_path / name).mkdir()
    suite = suite_text("base").replace("[publish]", '[fuse]\ntrusted_keys = "keys"\n[publish]')
    (tmp_path / "suite.toml").write_text(suite.replace('[run]\nbase = "./base"\n', ""))
    (tmp_path / "experiment.toml").write_text('config = "suite.toml"\n[[variant]]\nname = "a"\nfinetune.epochs = 3\n')
    ran = experiment(tmp_path / "experiment.toml", tmp_path / "deep" / "runs", commands)
    assert ran.returncode == 0, ran.stderr
    made = tomllib.loads((tmp_path / "deep" / "runs" / "a.toml").read_text())
    assert "run" not in made
    assert made["finetune"]["epochs"] == 3
    assert made["fuse"]["trusted_keys"] == "../../keys"
    assert made["dataset"][0]["path"] == "../../red"


@pytest.mark.parametrize("name", ["contributors", "data", "federated", "once"])
def test_the_experiments_that_ship_are_sound(tmp_path: Path, name: str, commands: Path) -> None:
    ran = experiment(ROOT / "configs" / "experiments" / f"{name}.toml", tmp_path / "runs", commands)
    assert ran.returncode == 0, ran.stderr
    assert len(list((tmp_path / "runs").glob("*.toml"))) >= 2
