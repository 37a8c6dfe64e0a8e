"""Evaluate: which models are measured how, and that the test split decides nothing."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from coldctl.core import leaderboard
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


def test_against_roberta_base_the_report_names_a_place_on_the_leaderboard(tmp_path: Path, coldctl: Run) -> None:
    base = tiny.make_base("roberta", tmp_path / "roberta-base")
    for name in ("rte", "mine"):
        tiny.make_dataset(tmp_path / name)
    tables = "".join(f'[[dataset]]\nname = "{name}"\npath = "{name}"\n' for name in ("rte", "mine"))
    (tmp_path / "suite.toml").write_text(f"[finetune]\nepochs = 1\nbatch_size = 16\n{tables}")
    for output, baseline in (("out", base), ("other", shutil.copytree(base, tmp_path / "another"))):
        ran = coldctl("evaluate", tiny.perturb(base, tmp_path / f"model-{output}", seed=1), "--baseline", baseline, "--suite",
                      tmp_path / "suite.toml", "--output", tmp_path / output, "--protocol", "finetune", "--jobs", 1)  # fmt: skip
        assert ran.code == 0, ran.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    score = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]["mean"]
    assert f"{score:.2f} on 1 of its 36 datasets, where the published roberta-base has 72.40" in report
    assert "leaderboard" not in (tmp_path / "other" / "report.md").read_text()


def test_the_published_ranking_is_reproduced() -> None:
    assert leaderboard.standing({"unknown": 50.0}) is None
    with (Path(leaderboard.__file__).with_name("leaderboard.csv")).open() as file:
        rows = {row["model_name"]: row for row in csv.DictReader(file)}
    row = rows["ibm/ColD-Fusion"]
    scores = {name: float(value) for name, value in row.items() if name not in ("model_name", "avg", "mnli_lp")}
    found = leaderboard.standing(scores)
    assert found is not None
    assert found.datasets == 36
    assert round(found.mean, 2) == 78.47
    assert found.published_baseline == pytest.approx(76.22, abs=0.01)
    assert found.published_deviation == 0.36
    assert found.rank == sum(float(other["avg"] or 0) > 78.475 for other in list(rows.values())[1:-1]) + 1
