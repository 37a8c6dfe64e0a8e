"""Evaluate: which models are measured how, and that the test split decides nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import Ran, suite_text

Run = Callable[..., Ran]


@pytest.fixture
def rivals(tmp_path: Path, base: Path) -> list[Path]:
    """Three models that differ from the base by more and more noise."""
    return [
        tiny.perturb(base, tmp_path / name, seed=1, scale=scale) for name, scale in (("a", 0.01), ("b", 0.2), ("c", 2))
    ]


def cells(evaluation: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted((evaluation / "cells").glob("*.json"))]


def test_multitask_trains_one_body_on_all_datasets(tmp_path: Path, base: Path, suite: Path, coldctl: Run) -> None:
    command = ("evaluate", tiny.perturb(base, tmp_path / "other", seed=1), "--baseline", base, "--suite", suite,
               "--output", tmp_path / "out", "--protocol", "multitask", "--seeds", 2, "--jobs", 1, "--json")  # fmt: skip
    ran = coldctl(*command)
    assert ran.code == 0, ran.stderr
    assert [(entry["dataset"], entry["protocol"]) for entry in ran.json["results"]] == [
        (name, "multitask") for name in ("red", "green", "blue")
    ]
    found = cells(tmp_path / "out")
    assert len(found) == 4  # two models, two seeds
    for cell in found:
        assert len(cell["datasets"]) == len(cell["predictions"]) == 3  # type: ignore[arg-type]
        assert cell["steps"] == 9  # as many as the three trainings alone: 48 examples in batches of 16
    again = coldctl(*command)
    assert "left alone" in again.stderr
    assert again.json == ran.json


def test_a_shortlist_is_made_by_linear_probe_on_validation(
    tmp_path: Path, base: Path, suite: Path, rivals: list[Path], coldctl: Run
) -> None:
    ran = coldctl("evaluate", *rivals, "--baseline", base, "--suite", suite, "--output", tmp_path / "out",
                  "--protocol", "finetune", "--shortlist", 1, "--jobs", 1, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    measured = {(entry["model"], entry["protocol"]) for entry in ran.json["results"]}
    assert {model for model, protocol in measured if protocol == "linear-probe"} == {"a", "b", "c"}
    finetuned = [model for model, protocol in measured if protocol == "finetune"]
    assert len(finetuned) == 1
    names = {item["body_digest"]: item["name"] for item in ran.json["models"]}
    scores: dict[str, float] = {}
    for cell in cells(tmp_path / "out"):
        if cell["protocol"] == "linear-probe" and cell["model"] in names:
            name = names[str(cell["model"])]
            scores[name] = scores.get(name, 0.0) + float(str(cell["validation"]))
    assert finetuned == [max(scores, key=lambda name: scores[name])]
    assert "shortlist" in ran.stderr


def test_the_test_split_decides_nothing(tmp_path: Path, base: Path, coldctl: Run) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "suite.toml").write_text(suite_text("base"))
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    other = tiny.perturb(base, tmp_path / "other", seed=1)

    def decided(output: Path) -> list[Any]:
        ran = coldctl("evaluate", other, "--baseline", base, "--suite", tmp_path / "suite.toml", "--output", output,
                      "--protocol", "linear-probe", "--protocol", "finetune", "--protocol", "few-shot", "--shots", 8,
                      "--jobs", 1)  # fmt: skip
        assert ran.code == 0, ran.stderr
        return sorted(
            (str(cell["model"]), str(cell["protocol"]), str(cell.get("c")), cell["validation"], cell["predictions"])
            for cell in cells(output)
        )

    before = decided(tmp_path / "one")
    for name in ("red", "green", "blue"):
        file = tmp_path / name / "test.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["label"] = {"negative": "positive", "positive": "negative"}[row["label"]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert decided(tmp_path / "two") == before
