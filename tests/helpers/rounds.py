"""Run the commands of a whole round, and read what an evaluation wrote."""

import json
from pathlib import Path
from typing import Any

import jsonschema

from coldctl.evaluation import leaderboard
from helpers.trail import Run


def validated(folder: Path) -> Any:
    """An evaluation's `results.json`, which its schema must accept."""
    schema = json.loads((Path(leaderboard.__file__).with_name("results.schema.json")).read_text())
    results = json.loads((folder / "results.json").read_text())
    jsonschema.validate(results, schema)
    return results


def rounds(coldctl: Run, run: Path, suite: Path, iterations: int) -> None:
    """What `make iterate` does, with one job."""
    assert coldctl("plan", run, "--config", suite, "--target", iterations).code == 0
    for number in range(1, iterations + 1):
        place = run / f"iteration-{number:03d}"
        for command in (
            ("finetune", "--suite", suite, "--base", run, "--output", run, "--jobs", 1),
            ("fuse", place / "contributions", "--config", suite, "--base", run, "--output", place / "fused"),
            ("evaluate", place / "fused", "--suite", suite, "--output", place / "evaluation", "--jobs", 1,
             "--baseline", json.loads(coldctl("status", run, "--json").stdout)["pretrained"]),
            ("promote", run),
        ):  # fmt: skip
            ran = coldctl(*command)
            assert ran.code == 0, (command, ran.stderr)
