"""The whole chain through the command line, for every kind of encoder: finetune, fuse, evaluate, publish, load."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import FAST, Ran, suite_text
from helpers import tiny

KINDS = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert")


@pytest.mark.parametrize("kind", KINDS)
def test_finetune_fuse_evaluate_publish_load(kind: str, tmp_path: Path, coldctl: Callable[..., Ran]) -> None:
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

    base = tiny.make_base(kind, tmp_path / "base")
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(tmp_path / name, seed=seed, pair=kind == "bert")
    suite = tmp_path / "suite.toml"
    suite.write_text(suite_text("base"))

    ran = coldctl("finetune", "--suite", suite, "--base", base, "--output", tmp_path / "contributions", "--jobs", 1)
    assert ran.code == 0, ran.stderr
    assert sorted(child.name for child in (tmp_path / "contributions").iterdir()) == ["green", "red"]
    contribution = tmp_path / "contributions" / "red"
    assert json.loads((contribution / "config.json").read_text())["id2label"] == {"0": "negative", "1": "positive"}
    answer = pipeline("text-classification", str(contribution))("What a morning.")
    assert answer[0]["label"] in ("negative", "positive")

    fused = tmp_path / "fused"
    ran = coldctl("fuse", tmp_path / "contributions", "--base", base, "--output", fused, "--json")
    assert ran.code == 0, ran.stderr
    assert [item["status"] for item in ran.json["contributions"]] == ["fused", "fused"]
    assert all(item["verified"] for item in ran.json["contributions"])

    ran = coldctl(
        "evaluate", fused, "--baseline", base, "--suite", suite, "--output", tmp_path / "evaluation", "--jobs", 1,
        "--protocol", "linear-probe", "--protocol", "finetune", "--seeds", 2, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    results = ran.json
    assert {(entry["dataset"], entry["protocol"]) for entry in results["results"]} == {
        (name, protocol) for name in ("red", "green", "blue") for protocol in ("linear-probe", "finetune")
    }
    for entry in results["results"]:
        assert entry["gain"] == pytest.approx(entry["mean"] - entry["baseline_mean"])
        assert entry["gain_interval"][0] <= entry["gain"] <= entry["gain_interval"][1]
        assert entry["verdict"] in ("better", "worse", "indistinguishable")
        assert len(entry["seeds"]) == (1 if entry["protocol"] == "linear-probe" else 2)
    assert (tmp_path / "evaluation" / "report.md").read_text().count("| red |") == 2
    assert (tmp_path / "evaluation" / "gain.png").read_bytes().startswith(b"\x89PNG")

    target = tmp_path / "published"
    ran = coldctl("publish", fused, "--to", target, "--evaluation", tmp_path / "evaluation", "--license", "mit")
    assert ran.code == 0, ran.stderr
    assert "license: mit" in (target / "README.md").read_text()
    model, report = AutoModel.from_pretrained(target, output_loading_info=True)
    assert not [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    assert not report["unexpected_keys"]
    AutoModelForSequenceClassification.from_pretrained(target, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(target)
    inputs = tokenizer(["A short text.", "And a second one."], padding=True, return_tensors="pt")
    source = AutoModel.from_pretrained(fused)
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, source(**inputs).last_hidden_state)
    lineage = coldctl("lineage", target, "--json").json["lineage"]
    assert [generation["kind"] for generation in lineage] == ["pretrained", "published"]
    assert len(lineage[-1]["contributions"]) == 2
    for path in tmp_path.rglob("coldctl.json"):
        assert str(tmp_path) not in path.read_text()


def test_finetuning_learns(tmp_path: Path, base: Path, coldctl: Callable[..., Ran]) -> None:
    data = tiny.make_dataset(tmp_path / "data", train=160)
    ran = coldctl(
        "finetune", data, "--base", base, "--output", tmp_path / "out", "--epochs", 12, "--batch-size", 16,
        "--learning-rate", 3e-3, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert ran.json["manifest"]["metrics"]["test"]["accuracy"] > 80
    assert ran.json["train_examples_per_second"] > 0


def test_same_inputs_give_the_same_bytes(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Callable[..., Ran]
) -> None:
    for name in ("a", "b"):
        assert (
            coldctl("finetune", dataset, "--base", base, "--output", tmp_path / name, "--name", "same", *FAST).code == 0
        )
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    assert coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "c", "--seed", 1, *FAST).code == 0
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != first


def test_complete_output_is_left_alone(
    tmp_path: Path, base: Path, dataset: Path, contributions: Path, coldctl: Callable[..., Ran]
) -> None:
    finetune = ("finetune", dataset, "--base", base, "--output", tmp_path / "one", *FAST)
    fuse = ("fuse", contributions, "--base", base, "--output", tmp_path / "fused")
    for command, change in ((finetune, ("--seed", 5)), (fuse, ("--dtype", "float16"))):
        output = Path(str(command[command.index("--output") + 1]))
        assert coldctl(*command).code == 0
        before = (output / "coldctl.json").stat().st_mtime_ns
        for flags in ((), ("--overwrite",)):
            again = coldctl(*command, *flags)
            assert again.code == 0
            assert "left alone" in again.stderr
        assert (output / "coldctl.json").stat().st_mtime_ns == before
        other = coldctl(*command, *change)
        assert other.code == 2
        assert "--overwrite" in other.stderr
        assert coldctl(*command, *change, "--overwrite").code == 0
        assert (output / "coldctl.json").stat().st_mtime_ns != before
        assert sorted(child.name for child in output.parent.iterdir() if child.name.startswith(".")) == []


@pytest.mark.parametrize("form", tiny.FORMS)
def test_every_file_format_is_the_same_dataset(
    form: str, tmp_path: Path, base: Path, dataset: Path, coldctl: Callable[..., Ran]
) -> None:
    data = tiny.make_dataset(tmp_path / "data", form=form)  # type: ignore[arg-type]
    fingerprints = []
    for number, source in enumerate((dataset, data)):
        ran = coldctl("finetune", source, "--base", base, "--output", tmp_path / f"out-{number}", *FAST, "--json")
        assert ran.code == 0, ran.stderr
        fingerprints.append(ran.json["manifest"]["dataset"]["fingerprint"])
    assert fingerprints[0] == fingerprints[1]


def test_regression(tmp_path: Path, base: Path, coldctl: Callable[..., Ran]) -> None:
    rows = [{"text": f"word {'good ' * (i % 5)}end {i}", "label": (i % 5) / 4} for i in range(60)]
    for split, part in (("train", rows[:40]), ("validation", rows[40:50]), ("test", rows[50:])):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    suite = tmp_path / "suite.toml"
    suite.write_text(
        '[finetune]\nepochs = 2\nbatch_size = 8\n[[dataset]]\nname = "s"\npath = "./data"\nmetric = "spearman"\n'
    )
    ran = coldctl("finetune", "--suite", suite, "--base", base, "--output", tmp_path / "c", "--jobs", 1)
    assert ran.code == 0, ran.stderr
    assert "spearman" in ran.stderr
    ran = coldctl(
        "evaluate", tmp_path / "c" / "s", "--baseline", base, "--suite", suite, "--output", tmp_path / "e", "--jobs", 1,
        "--protocol", "linear-probe", "--protocol", "finetune", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert {entry["metric"] for entry in ran.json["results"]} == {"spearman"}
    assert [entry["verdict"] for entry in ran.json["results"] if entry["protocol"] == "finetune"] == [None]


def test_a_card_tells_of_its_own_model_only(
    tmp_path: Path, base: Path, contributions: Path, suite: Path, coldctl: Callable[..., Ran]
) -> None:
    for name, part in (("a", contributions), ("b", contributions / "one")):
        assert coldctl("fuse", part, "--base", base, "--output", tmp_path / name).code == 0
    ran = coldctl(
        "evaluate",
        tmp_path / "a",
        tmp_path / "b",
        "--baseline",
        base,
        "--suite",
        suite,
        "--output",
        tmp_path / "e",
        "--jobs",
        1,
    )
    assert ran.code == 0, ran.stderr
    ran = coldctl("publish", tmp_path / "a", "--to", tmp_path / "p", "--evaluation", tmp_path / "e", "--license", "mit")
    assert ran.code == 0, ran.stderr
    card = (tmp_path / "p" / "README.md").read_text()
    assert card.count("name: accuracy (linear-probe)") == 3
    assert card.count("| red |") == 1
    ran = coldctl("publish", contributions / "one", "--to", tmp_path / "q", "--license", "mit")
    assert ran.code == 0, ran.stderr
    assert "Nothing was fused into it yet" in (tmp_path / "q" / "README.md").read_text()


def test_the_same_weights_under_another_config_are_another_model(
    tmp_path: Path, base: Path, suite: Path, coldctl: Callable[..., Ran]
) -> None:
    import shutil

    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "relu", "layer_norm_eps": 10.0}))
    ran = coldctl(
        "evaluate", other, "--baseline", base, "--suite", suite, "--output", tmp_path / "e", "--jobs", 1, "--json"
    )
    assert ran.code == 0, ran.stderr
    assert len(list((tmp_path / "e" / "cells").glob("*.json"))) == 6
