"""Finetune: what it learns, what it leaves behind, and that killing it anywhere changes nothing."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import FAST, Ran
from helpers import tiny
from helpers.training import check_processes_take_the_steps_of_one

Run = Callable[..., Ran]


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bits(tmp_path: Path, base: Path, coldctl: Run) -> None:
    data = tiny.make_dataset(tmp_path / "data", train=160)
    flags = ("--epochs", 6, "--batch-size", 16, "--learning-rate", 1e-4, "--patience", 999, "--name", "same")
    assert coldctl("finetune", data, "--base", base, "--output", tmp_path / "whole", *flags, "--jobs", 1).code == 0
    command = [sys.executable, "-m", "coldctl", "finetune", data, "--base", base, "--output", tmp_path / "cut", *flags]
    state = tmp_path / ".cut.partial" / "training" / "state.safetensors"
    resumed = []
    for attempt in range(4):
        process = subprocess.Popen([*map(str, command), "--checkpoint-seconds", "0"], stderr=subprocess.PIPE, text=True)
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and attempt < 3:
            if state.exists() and state.stat().st_mtime_ns != before:
                time.sleep(0.05 * attempt)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        _, said = process.communicate(timeout=120)
        resumed += re.findall(r"going on from step (\d+) of 60", said)
    steps = [int(step) for step in resumed]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    for name in ("model.safetensors", "config.json", "training.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "cut" / "training").exists()
    assert not state.parent.parent.exists()


def test_a_checkpoint_that_is_not_whole_is_not_used(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    flags = ("finetune", dataset, "--base", base, *FAST, "--name", "same", "--jobs", 1)
    assert coldctl(*flags, "--output", tmp_path / "whole").code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "coldctl", *map(str, flags), "--output", str(tmp_path / "cut")], stderr=subprocess.PIPE
    )
    folder = tmp_path / ".cut.partial"
    while not folder.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (folder / "training").mkdir(exist_ok=True)
    (folder / "training" / "state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    ran = coldctl(*flags, "--output", tmp_path / "cut")
    assert ran.code == 0, ran.stderr
    assert "going on" not in ran.stderr
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_low_rank_contributions_are_fused_as_products(tmp_path: Path, base: Path, coldctl: Run) -> None:
    for seed, name in enumerate(("one", "two")):
        data = tiny.make_dataset(tmp_path / f"data-{name}", seed=seed)
        ran = coldctl("finetune", data, "--base", base, "--output", tmp_path / "c" / name, "--name", name,
                      "--lora-rank", 2, *FAST)  # fmt: skip
        assert ran.code == 0, ran.stderr
        written = tmp_path / "c" / name
        assert not (written / "model.safetensors").exists()
        assert str(base) not in (written / "adapter_config.json").read_text()
        modules = json.loads((written / "adapter_config.json").read_text())["target_modules"]
        assert modules == sorted(modules)  # the same bytes in each process
        assert json.loads((written / "coldctl.json").read_text())["encoding"] == "adapter"
    ran = coldctl("fuse", tmp_path / "c", "--base", base, "--output", tmp_path / "fused", "--strict", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.stderr.count("verified") >= 2
    assert "unverified" not in ran.stderr
    start, fused = load_file(base / "model.safetensors"), load_file(tmp_path / "fused" / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    steps = []
    for folder in ("one", "two"):
        adapter = load_file(tmp_path / "c" / folder / "adapter_model.safetensors")
        inside = f"base_model.model.bert.{name.removesuffix('.weight')}"
        steps.append(adapter[f"{inside}.lora_B.weight"] @ adapter[f"{inside}.lora_A.weight"] * 2)
    assert float(steps[0].abs().max()) > 0
    torch.testing.assert_close(fused[name], start[name] + (steps[0] + steps[1]) / 2)
    bare = tiny.make_base("distilbert", tmp_path / "distilbert")  # a body without a pooler
    ran = coldctl("finetune", data, "--base", bare, "--output", tmp_path / "bare", "--lora-rank", 2, *FAST)
    assert ran.code == 0, ran.stderr
    assert coldctl("check", tmp_path / "bare", "--base", bare, "--deep").code == 0
    ran = coldctl("finetune", data, "--base", base, "--output", tmp_path / "x", "--lora-rank", 2, "--fisher", *FAST)
    assert ran.code == 2
    assert "--fisher" in ran.stderr


def test_fisher_information_feeds_the_fisher_method(tmp_path: Path, base: Path, coldctl: Run) -> None:
    for seed, name in enumerate(("one", "two")):
        data = tiny.make_dataset(tmp_path / f"data-{name}", seed=seed)
        place = tmp_path / "c" / name
        ran = coldctl("finetune", data, "--base", base, "--output", place, "--name", name, "--fisher", *FAST)
        assert ran.code == 0, ran.stderr
    information = load_file(tmp_path / "c" / "one" / "fisher.safetensors")
    assert all(float(value.min()) >= 0 for value in information.values())
    assert float(information["encoder.layer.0.output.dense.weight"].max()) > 0
    ran = coldctl("fuse", tmp_path / "c", "--base", base, "--output", tmp_path / "fused", "--method", "fisher")
    assert ran.code == 0, ran.stderr


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "mpnet", "modernbert"])
def test_what_is_frozen_stays(kind: str, tmp_path: Path, dataset: Path, coldctl: Run) -> None:
    base = tiny.make_base(kind, tmp_path / "base")
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--freeze-layers", 1, *FAST)
    assert ran.code == 0, ran.stderr
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    prefix = tiny.PREFIXES[kind]
    changed = {
        name for name, value in before.items()
        if f"{prefix}.{name}" in after and not torch.equal(after[f"{prefix}.{name}"], value)
    }  # fmt: skip
    assert any(".1." in name for name in changed)
    assert all(".1." in name or name.startswith(("pooler", "final_norm")) for name in changed), changed
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "no", "--freeze-layers", 99, *FAST)
    assert ran.code == 2
    assert "2 layers" in ran.stderr


def test_an_anchor_keeps_the_body_near_its_base(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    before = load_file(base / "model.safetensors")
    distances = []
    for name, flags in (("free", ()), ("held", ("--anchor", 100))):
        ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / name, *FAST, "--epochs", 3, *flags)
        assert ran.code == 0, ran.stderr
        after = load_file(tmp_path / name / "model.safetensors")
        distances.append(sum(float((after[f"bert.{key}"] - value).square().sum()) for key, value in before.items()))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.usefixtures("traced_children")
def test_several_processes_take_the_steps_of_one(tmp_path: Path, coldctl: Run) -> None:
    check_processes_take_the_steps_of_one("torchrun", tmp_path, coldctl)


def test_several_labels_at_once(tmp_path: Path, base: Path, coldctl: Run) -> None:
    words = {"food": tiny.THEMES["food"], "sport": tiny.THEMES["sport"], "music": tiny.THEMES["music"]}
    generator = np.random.default_rng(0)
    for split, count in (("train", 240), ("validation", 30), ("test", 30)):
        rows = []
        for _ in range(count):
            chosen = [name for name in words if generator.random() < 0.5]
            text = " ".join(["the", *(str(generator.choice(words[name])) for name in chosen for _ in range(2)), "day"])
            rows.append({"text": text, "label": chosen})
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = coldctl("finetune", tmp_path / "data", "--base", base, "--output", tmp_path / "out", "--epochs", 20,
                  "--batch-size", 8, "--learning-rate", 3e-3, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert ran.json["manifest"]["metrics"]["test"]["accuracy"] > 50  # all three right; by chance 12.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert sorted(config["label2id"]) == ["food", "music", "sport"]


def test_shots_count_in_all_or_in_each_class(tmp_path: Path, base: Path, coldctl: Run) -> None:
    data = tiny.make_dataset(tmp_path / "data", train=60, labels=("food", "sport", "music"))
    for flags, expected in ((("--shots", 10), 10), (("--shots", 10, "--shots-per-class"), 30)):
        output = tmp_path / f"out-{expected}"
        ran = coldctl("finetune", data, "--base", base, "--output", output, *flags, *FAST, "--json")
        assert ran.code == 0, ran.stderr
        assert ran.json["manifest"]["dataset"]["num_train"] == expected
    ran = coldctl("finetune", data, "--base", base, "--output", tmp_path / "no", "--shots-per-class", *FAST)
    assert ran.code == 2
    assert "give --shots" in ran.stderr


def test_a_summary_says_scores_reason_and_time(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--name", "mine",
                  "--epochs", 30, "--batch-size", 16, "--learning-rate", 1e-3, "--patience", 2)  # fmt: skip
    assert ran.code == 0, ran.stderr
    line = next(line for line in ran.stderr.splitlines() if line.startswith("mine: validation"))
    assert re.search(r"validation accuracy [\d.]+, test accuracy [\d.]+; no improvement in 2 validations; .* s: ", line)


def test_the_manifest_lists_what_is_there(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    for name, flags in (("full", ()), ("adapter", ("--lora-rank", 2))):
        ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / name, *flags, *FAST)
        assert ran.code == 0, ran.stderr
        there = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}
        assert set(json.loads((tmp_path / name / "coldctl.json").read_text())["files"]) == there - {"coldctl.json"}


def test_numbers_far_from_zero_are_learned_as_well(tmp_path: Path, base: Path, coldctl: Run) -> None:
    data = tiny.make_dataset(tmp_path / "data", train=200, labels=("food", "sport"))
    for split in tiny.SPLITS:
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["label"] = 1000.5 + (row["label"] == "food") + 0.001 * (number % 7)
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = coldctl("finetune", data, "--base", base, "--output", tmp_path / "out", "--epochs", 8, "--batch-size", 8,
                  "--learning-rate", 3e-3, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert ran.json["manifest"]["metrics"]["test"]["spearman"] > 50
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        found = float(model(**tokenizer("apple bread butter", return_tensors="pt")).logits)
    assert 1000 < found < 1003  # in the labels' own units


def test_processes_that_see_different_data_say_so(tmp_path: Path, base: Path) -> None:
    one, two = (tiny.make_dataset(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    command = f'exec {sys.executable} -m coldctl finetune $([ "$RANK" = 0 ] && echo {one} || echo {two}) --name same '
    command += f"--base {base} --output {tmp_path / 'out'} --epochs 1"
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "sh", "-c",
         command], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode != 0
    assert ran.stderr.count("error: the processes see different data or bases") == 1
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_are_refused(tmp_path: Path, base: Path, coldctl: Run) -> None:
    numbers = tiny.make_dataset(tmp_path / "data")
    for split in tiny.SPLITS:
        rows = [json.loads(line) for line in (numbers / f"{split}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["label"] = number + 0.5
        (numbers / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for flags in (("--class-weights", "balanced"), ("--label-smoothing", 0.1), ("--lora-rank", 4000)):
        ran = coldctl("finetune", numbers, "--base", base, "--output", tmp_path / "out", *flags, *FAST)
        assert ran.code == 2, flags
        assert str(flags[0]) in ran.stderr
        assert not (tmp_path / "out").exists()
