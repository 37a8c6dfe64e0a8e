"""Evaluate: which models are measured how, and that the test split decides nothing."""

import csv
import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from coldctl.config.settings import DatasetConfig
from coldctl.data.datasets import Limits, load_dataset
from coldctl.evaluation import charts, curves, leaderboard
from coldctl.evaluation.models import models_under_test
from conftest import Ran, suite_text
from helpers import tiny
from helpers.rounds import rounds, validated

Run = Callable[..., Ran]
ROOT = Path(__file__).parents[2]


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


def test_the_schema_is_generated_from_the_types() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "results_schema.py"))
    assert script["PATH"].read_text() == script["schema_text"](), "run scripts/results_schema.py"


def test_results_follow_their_schema(tmp_path: Path, base: Path, suite: Path, coldctl: Run) -> None:
    other = tiny.perturb(base, tmp_path / "other", seed=1)
    ran = coldctl("evaluate", other, "--baseline", base, "--suite", suite, "--output", tmp_path / "out", "--protocol",
                  "linear-probe", "--protocol", "few-shot", "--shots", 8, "--seeds", 2, "--jobs", 1)  # fmt: skip
    assert ran.code == 0, ran.stderr
    results = validated(tmp_path / "out")
    for entry in results["results"]:
        for item in entry["seeds"]:
            cell = json.loads((tmp_path / "out" / "cells" / f"{item['cell']}.json").read_text())
            assert (cell["protocol"], cell["seed"], cell["model"]) == (
                entry["protocol"], item["seed"], results["models"][0]["body_digest"],
            )  # fmt: skip
    del results["results"][0]["gain_interval"]
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    with pytest.raises(jsonschema.ValidationError):
        validated(tmp_path / "out")


def test_weights_that_changed_under_their_manifest_are_not_taken_for_the_old_ones(
    tmp_path: Path, base: Path, suite: Path, contributions: Path, coldctl: Run
) -> None:
    model = shutil.copytree(contributions / "one", tmp_path / "model")

    def evaluated(output: str) -> Ran:
        return coldctl(
            "evaluate", model, "--baseline", base, "--suite", suite, "--output", tmp_path / output, "--jobs", 1
        )

    assert evaluated("before").code == 0
    shutil.copy2(tiny.perturb(model, tmp_path / "other", seed=1, scale=2) / "model.safetensors", model)
    ran = evaluated("after")
    assert ran.code == 2
    assert "its manifest says" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "after").exists()
    (model / "coldctl.json").unlink()  # then it is a plain checkpoint
    assert evaluated("after").code == 0
    scores = [
        json.loads((tmp_path / output / "results.json").read_text())["results"][0]["seeds"][0]["cell"]
        for output in ("before", "after")
    ]
    assert scores[0] != scores[1]


def test_curves_begin_at_the_pretrained_model_and_tell_nothing_twice() -> None:
    models = [{"name": f"i{number}", "run": "run", "iteration": number} for number in (1, 2)]
    averages = [
        {"model": f"i{number}", "protocol": "finetune", "group": "all", "mean": 50.0 + number, "baseline_mean": 50.0,
         "gain_interval": [number - 0.5, number + 0.5]}
        for number in (1, 2)
    ]  # fmt: skip
    both = {"models": models, "averages": averages}
    (panel,) = curves.panels_of(both, [both, {"models": models[:1], "averages": averages[:1]}])
    assert [point.iteration for point in panel.curves["run"]] == [1, 2]
    assert panel.levels == {"pretrained model": 50.0}
    figure = charts.curve_figure([panel, replace(panel, levels={}), panel], columns=2)
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]
    lines = [figure.axes[number].get_lines()[0].get_xydata().tolist() for number in (0, 1)]
    assert lines == [[[0, 50], [1, 51], [2, 52]], [[1, 51], [2, 52]]]


def test_test_examples_in_another_training_split_are_counted(tmp_path: Path, base: Path, coldctl: Run) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "suite.toml").write_text(suite_text("base"))
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    test = (tmp_path / "blue" / "test.jsonl").read_text().splitlines()
    with (tmp_path / "red" / "train.jsonl").open("a") as file:
        file.write("".join(f"{line}\n" for line in test[:5]))
    ran = coldctl("evaluate", tiny.perturb(base, tmp_path / "other", seed=1), "--baseline", base, "--suite",
                  tmp_path / "suite.toml", "--output", tmp_path / "out", "--jobs", 1)  # fmt: skip
    assert ran.code == 0, ran.stderr
    wanted = [{"test_of": "blue", "train_of": "red", "examples": 5, "num_test": 24}]
    assert validated(tmp_path / "out")["overlaps"] == wanted
    sentence = "5 of the 24 test examples of blue also stand in the training split of red"
    for name in ("report.md", "report.html"):
        assert sentence in (tmp_path / "out" / name).read_text()
    assert sentence in ran.stderr


def test_a_dataset_split_over_contributors(tmp_path: Path, base: Path, coldctl: Run) -> None:
    shutil.copytree(base, tmp_path / "base")
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    suite = tmp_path / "suite.toml"
    suite.write_text(suite_text("base").replace('name = "red"\n', 'name = "red"\ncontributors = 3\n'))
    ran = coldctl("finetune", "--suite", suite, "--base", base, "--output", tmp_path / "all", "--jobs", 1, "--json")
    assert ran.code == 0, ran.stderr
    records = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "all").glob("*/coldctl.json")}
    assert sorted(records) == ["green", "red-1", "red-2", "red-3"]
    shares = [records[f"red-{part}"]["dataset"] for part in (1, 2, 3)]
    assert [share["num_train"] for share in shares] == [16, 16, 16]
    assert [share["num_validation"] for share in shares] == [6, 5, 5]
    assert {share["num_test"] for share in shares} == {24}
    assert len({share["fingerprint"] for share in shares}) == 3
    dataset = DatasetConfig("red", str(tmp_path / "red"), contributors=3)
    parts = [load_dataset(replace(dataset, part=part), Limits(), 0) for part in (1, 2, 3)]
    whole = load_dataset(dataset, Limits(), 0)
    assert sorted(text for part in parts for text in part.train.texts) == sorted(whole.train.texts)
    only = coldctl(
        "finetune", "--suite", suite, "--base", base, "--output", tmp_path / "one", "--only", "red-2", "--jobs", 1
    )
    assert only.code == 0, only.stderr
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["red-2"]
    suite.write_text(suite.read_text().replace("contributors = 3", "contributors = 40"))
    many = coldctl(
        "finetune", "--suite", suite, "--base", base, "--output", tmp_path / "many", "--only", "red-02", "--jobs", 1
    )
    assert many.code == 2
    assert "cannot be shared among 40 contributors" in many.stderr


def test_a_training_is_not_taken_for_that_of_the_same_data_under_another_name(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Run
) -> None:
    """A training's seed goes by the dataset's name: a cell of another name would pair runs of different luck."""
    other = tiny.perturb(base, tmp_path / "other", seed=1)
    (tmp_path / "suite.toml").write_text(
        "[finetune]\nepochs = 1\nbatch_size = 16\n"
        + "".join(f'[[dataset]]\nname = "{name}"\npath = "{dataset}"\n' for name in ("one", "two"))
    )
    ran = coldctl("evaluate", other, "--baseline", base, "--suite", tmp_path / "suite.toml", "--output", tmp_path / "out",
                  "--protocol", "linear-probe", "--protocol", "finetune", "--jobs", 1, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    cells_of = {(entry["protocol"], entry["dataset"]): entry["seeds"][0]["cell"] for entry in ran.json["results"]}
    assert cells_of["linear-probe", "one"] == cells_of["linear-probe", "two"]  # which has no seed
    assert cells_of["finetune", "one"] != cells_of["finetune", "two"]


def test_few_shot_without_shots_is_refused(tmp_path: Path, base: Path, suite: Path, coldctl: Run) -> None:
    ran = coldctl("evaluate", base, "--baseline", base, "--suite", suite, "--output", tmp_path / "out", "--shots", 0,
                  "--protocol", "few-shot", "--jobs", 1)  # fmt: skip
    assert ran.code == 2
    assert ran.stderr.strip() == "error: shots = 0 leaves few-shot nothing to train on: give --shots 1 or more"
    assert not (tmp_path / "out").exists()


def test_runs_are_told_apart_by_where_they_lie(tmp_path: Path, base: Path) -> None:
    for folder in ("one", "two"):
        fused = [tmp_path / folder / "demo" / f"iteration-00{number}" / "fused" for number in (1, 2)]
        for place in fused:
            shutil.copytree(base, place)
            (place / "coldctl.json").touch()
        (tmp_path / folder / "demo" / "run.json").touch()
    one, two = (tmp_path / folder / "demo" for folder in ("one", "two"))

    def runs(*places: Path) -> list[tuple[str | None, int | None]]:
        return [(item.run, item.iteration) for item in models_under_test([str(place) for place in places], None)]

    first, second = (place / "iteration-001" / "fused" for place in (one, two))
    assert runs(first, second) == [("demo", 1), ("demo-2", 1)]
    assert runs(first, one) == [("demo", 1), ("demo", 1), ("demo", 2)]  # the same run
    assert runs(one, second) == [("demo", 1), ("demo", 2), ("demo-2", 1)]
    shutil.copytree(base, one / "iteration-001" / "contributions" / "a")
    assert runs(one / "iteration-001" / "contributions" / "a") == [(None, None)]  # none of its iterations


def test_a_whole_run_is_measured_with_multitask_as_a_level(tmp_path: Path, base: Path, coldctl: Run) -> None:
    shutil.copytree(base, tmp_path / "base")
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    suite = tmp_path / "suite.toml"
    suite.write_text(suite_text("base"))
    rounds(coldctl, tmp_path / "run", suite, 2)
    page = (tmp_path / "run" / "iteration-002" / "evaluation" / "report.html").read_text()
    assert "Over iterations" in page  # with what iteration 1 found
    assert "Over iterations" not in (tmp_path / "run" / "iteration-001" / "evaluation" / "report.html").read_text()
    ran = coldctl("evaluate", tmp_path / "run", "--suite", suite, "--output", tmp_path / "out", "--protocol", "linear-probe",
                  "--protocol", "multitask", "--jobs", 1, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    measured = {(entry["model"], entry["protocol"]) for entry in ran.json["results"]}
    assert measured == {
        ("iteration-001", "linear-probe"), ("iteration-002", "linear-probe"), ("iteration-002", "multitask"),
    }  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text().split("## Over iterations")[1]
    assert "| pretrained model |" in report
    assert "| multitask |" in report
    latest = tmp_path / "run" / "iteration-002"
    text = suite.read_text()
    for old, new in (('role = "unseen"', 'role = "seen"'), ('name = "red"', 'name = "red"\nmetric = "macro_f1"')):
        suite.write_text(text.replace(old, new))  # then the iteration before was measured by something else
        ran = coldctl("evaluate", latest / "fused", "--baseline", tmp_path / "base", "--suite", suite, "--overwrite",
                      "--output", latest / "evaluation", "--jobs", 1)  # fmt: skip
        assert ran.code == 0, ran.stderr
        assert "Over iterations" not in (latest / "evaluation" / "report.html").read_text(), new


def test_what_changes_while_it_is_measured_is_noticed(
    tmp_path: Path, base: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the data a part that vanishes, of the measurements one that was made; what else was measured is kept."""
    from coldctl.artifacts.model_ref import memory_needed
    from coldctl.evaluation.measure import measure

    for seed, name in enumerate(("red", "green")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    text = "".join(f'[[dataset]]\nname = "{name}"\npath = "{name}"\nrole = "seen"\n' for name in ("red", "green"))
    (tmp_path / "suite.toml").write_text(text)
    changed = tiny.perturb(base, tmp_path / "changed", seed=1)
    command = ("evaluate", changed, "--baseline", base, "--suite", tmp_path / "suite.toml", "--output", tmp_path / "out",
               "--jobs", 1)  # fmt: skip
    validation = tmp_path / "green" / "validation.jsonl"

    def change(*arguments: Any, **options: Any) -> int:
        if validation.exists():
            validation.rename(tmp_path / "aside")
        return memory_needed(*arguments, **options)

    monkeypatch.setattr("coldctl.evaluation.measure.memory_needed", change)
    ran = coldctl(*command)
    assert ran.code == 2
    assert "2 of 4 measurements failed; the others are kept" in ran.stderr
    assert "green was changed while it was used" in ran.stderr
    (tmp_path / "aside").rename(validation)
    monkeypatch.undo()
    done = []

    def remove(*arguments: Any) -> str:
        done.append(measure(*arguments))
        if len(done) == 2:
            Path(done[0]).unlink()
        return done[-1]

    monkeypatch.setattr("coldctl.evaluation.measure.measure", remove)
    ran = coldctl(*command)
    assert len(done) == 2  # those of red are there
    assert ran.code == 2
    assert "was changed or removed while it was used: run the same command again" in ran.stderr
    assert coldctl(*command).code == 0
