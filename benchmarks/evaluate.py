"""What evaluating costs: linear probing beside one forward pass and beside the Trainer, a round beside the stitched chain.

    .venv/bin/python benchmarks/evaluate.py [--data ../shared/data] [--mergekit .venv-peers/bin/python] [--only probe,iteration]

- probe: for every dataset in --data, by turns: one forward pass of the bare model over its train, validation and test texts in
  length-sorted batches; coldctl's linear probe of the same texts, tokenizing, pooling and solver included; a head trained
  by the transformers `Trainer` on the frozen body for 10 epochs, with batches grouped by length (benchmarks/stitched.py).
- iteration: one full demo iteration (finetune three, fuse, evaluate base and fused on four datasets) by coldctl's commands
  and by the chain that people stitch together: a process per step, `Trainer` for finetuning and for probing with a
  frozen body, mergekit for the merge; the same data, epochs and seeds. Nothing is cached.

It prints Markdown and asserts nothing about time.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from stitched import train_head

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
BATCH = 32
STITCHED = Path(__file__).with_name("stitched.py")


def main() -> None:
    """Run what is asked for and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("assets/demo/base"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="a folder of datasets")
    parser.add_argument("--train", type=int, default=200, help="examples of each split of each dataset")
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--test", type=int, default=150)
    parser.add_argument("--length", type=int, default=64, help="tokens per example")
    parser.add_argument("--repeats", type=int, default=3, help="of forward pass and linear probe")
    parser.add_argument("--rounds", type=int, default=1, help="of the iteration")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"), help="of the iteration")
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", default=Path(".venv-peers/bin/python"))
    parser.add_argument("--only", default="probe,iteration")
    parser.add_argument("--no-trainer", action="store_true", help="leave the Trainer's heads out")
    options = parser.parse_args()
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("coldctl", "torch", "transformers", "scikit-learn")
    )
    print(f"\n- {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}")
    for section in options.only.split(","):
        {"probe": probe, "iteration": iteration}[section](options)


# Linear probing -----------------------------------------------------------------------------------------------


def probe(options: argparse.Namespace) -> None:
    """One forward pass, the linear probe, and the Trainer's head, dataset by dataset."""
    import torch

    from coldctl.training import model as models

    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer, body = models.load_tokenizer(options.base), models.load_body(options.base)
    rows = []
    for folder in sorted(path for path in options.data.iterdir() if (path / "train.jsonl").is_file()):
        rows.append(one_dataset(folder, options, tokenizer, body))
        print(f"  {rows[-1]['name']}: {rows[-1]}", file=sys.stderr)
    total = {
        key: sum(row[key] for row in rows) for key in ("texts", "forward", "tokenize", "features", "solve", "trainer")
    }
    print(
        f"\n- {len(rows)} datasets, {options.train} training, {options.validation} validation, {options.test} test examples of "
        f"each, at most {options.length} tokens, batch {BATCH}; seconds are medians of {options.repeats}\n"
    )
    print(
        "| dataset | forward pass, s | tokenize | features | solver | probe / forward | accuracy | Trainer, s | its accuracy |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: | --: | --: |")
    for row in [*rows, {"name": "**all**", **total}]:
        whole = row["tokenize"] + row["features"] + row["solve"]
        scores = [
            statistics.mean(item[key] for item in rows) if row["name"] == "**all**" else row[key]
            for key in ("ours", "its")
        ]
        print(
            f"| {row['name']} | {row['forward']:.2f} | {row['tokenize']:.2f} | {row['features']:.2f} | {row['solve']:.2f} "
            f"| {whole / row['forward']:.2f} | {scores[0]:.1f} | {row['trainer']:.1f} | {scores[1]:.1f} |"
        )
    whole = total["tokenize"] + total["features"] + total["solve"]
    print("\n| claim | measured | aim |\n| --- | --: | --: |")
    print(f"| linear probe of the suite / one forward pass | {whole / total['forward']:.2f} | at most 1.2 |")
    print(
        f"| features / bare forward pass, texts per second | {100 * total['forward'] / total['features']:.0f} % | at least 80 % |"
    )
    print(f"| Trainer's heads, 10 epochs / linear probe | {total['trainer'] / whole:.1f} |  |")


def one_dataset(folder: Path, options: argparse.Namespace, tokenizer: Any, body: Any) -> dict[str, Any]:
    """Seconds and test accuracy of each way, by turns."""
    import torch

    from coldctl.common.progress import SILENT
    from coldctl.config.settings import DatasetConfig
    from coldctl.data.datasets import Limits, load_dataset
    from coldctl.evaluation import scoring
    from coldctl.evaluation.probe import features
    from coldctl.evaluation.probe import probe as solve
    from coldctl.training import model as models
    from coldctl.training.batches import collate, sorted_batches

    config = DatasetConfig(folder.name, str(folder), text_pair="text_pair" if has_pairs(folder) else None)
    dataset = load_dataset(config, Limits(options.train, options.validation, options.test), 0)
    splits = (dataset.train, dataset.validation, dataset.test)
    device = torch.device("cpu")
    seconds: dict[str, list[float]] = {key: [] for key in ("forward", "tokenize", "features", "solve")}
    for _ in range(options.repeats):
        started = time.perf_counter()
        encoded = [models.encode(tokenizer, split.texts, split.pairs, options.length) for split in splits]
        seconds["tokenize"].append(time.perf_counter() - started)
        batches = [
            collate(part, batch, tokenizer.pad_token_id, device)
            for part in encoded
            for batch in sorted_batches(part.lengths, BATCH)
        ]
        with torch.inference_mode():
            body(**batches[0])
            started = time.perf_counter()
            for batch in batches:
                body(**batch)
            seconds["forward"].append(time.perf_counter() - started)
        started = time.perf_counter()
        found = [features(body, part, "mean", tokenizer.pad_token_id, device, SILENT, "x") for part in encoded]
        seconds["features"].append(time.perf_counter() - started)
        started = time.perf_counter()
        predictions, _, _ = solve(
            (found[0], dataset.train.labels), (found[1], dataset.validation.labels), found[2],
            lambda truth, given: scoring.score("accuracy", truth, given),
        )  # fmt: skip
        seconds["solve"].append(time.perf_counter() - started)
    ours = scoring.score("accuracy", dataset.test.labels, predictions)
    its, spent = 0.0, 0.0
    if not options.no_trainer:
        texts = {name: (list(split.texts), None if split.pairs is None else list(split.pairs), split.labels.tolist())
                 for name, split in zip(("train", "validation", "test"), splits, strict=True)}  # fmt: skip
        its, spent = train_head(options.base, texts, len(dataset.labels), options.length, 0)
    return {
        "name": folder.name, "texts": sum(map(len, splits)), "ours": ours, "its": its, "trainer": spent,
        **{key: statistics.median(values) for key, values in seconds.items()},
    }  # fmt: skip


def has_pairs(folder: Path) -> bool:
    """Whether a dataset's rows have a second text."""
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        return "text_pair" in json.loads(file.readline())


# One full iteration -------------------------------------------------------------------------------------------


def iteration(options: argparse.Namespace) -> None:
    """coldctl's commands and the stitched chain, by turns."""
    found: dict[str, list[dict[str, Any]]] = {"coldctl": [], "stitched": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
            found["coldctl"].append(ours_round(options, Path(scratch)))
            print(f"  {found['coldctl'][-1]}", file=sys.stderr)
            found["stitched"].append(stitched_round(options, Path(scratch) / "stitched"))
            print(f"  {found['stitched'][-1]}", file=sys.stderr)
    print(f"\n- {options.config}: one iteration, whole processes, {options.rounds} of each, medians\n")
    print("| step | coldctl, s | stitched chain, s | ratio |\n| --- | --: | --: | --: |")
    for step in ("finetune three", "merge", "evaluate base and fused", "whole iteration"):
        ours, its = (statistics.median(run["seconds"][step] for run in found[who]) for who in ("coldctl", "stitched"))
        print(f"| {step} | {ours:.1f} | {its:.1f} | {its / ours:.1f} × |")
    print("\n| linear probe, test accuracy | coldctl | stitched chain |\n| --- | --: | --: |")
    for model in ("base", "fused"):
        for name in found["coldctl"][0]["scores"][model]:
            ours, its = (
                statistics.median(run["scores"][model][name] for run in found[who]) for who in ("coldctl", "stitched")
            )
            print(f"| {model}, {name} | {ours:.1f} | {its:.1f} |")
        ours, its = (statistics.mean(statistics.median(run["scores"][model][name] for run in found[who])
                                     for name in found[who][0]["scores"][model]) for who in ("coldctl", "stitched"))  # fmt: skip
        print(f"| **{model}, mean** | {ours:.1f} | {its:.1f} |")
    evaluate = statistics.median(run["seconds"]["evaluate base and fused"] for run in found["coldctl"])
    ours, its = (
        statistics.median(run["seconds"]["whole iteration"] for run in found[who]) for who in ("coldctl", "stitched")
    )
    print("\n| claim | measured | aim |\n| --- | --: | --: |")
    print(f"| `coldctl evaluate` of the demo suite, model and baseline | {evaluate:.0f} s | at most 60 s |")
    print(f"| stitched chain / coldctl, one iteration | {its / ours:.1f} × | at least 3 × |")


def timed(*command: object, **more: Any) -> float:
    """Seconds of a whole process."""
    environment = {**os.environ, **OFFLINE, **more}
    started = time.perf_counter()
    subprocess.run(
        [str(part) for part in command],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def ours_round(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The commands of scripts/iterate.sh, with nothing cached."""
    coldctl = (sys.executable, "-m", "coldctl")
    contributions, fused, evaluation = scratch / "contributions", scratch / "fused", scratch / "evaluation"
    finetune = ("finetune", "--suite", options.config, "--base", options.base, "--output", contributions, "--jobs", 2)
    fuse = ("fuse", contributions, "--config", options.config, "--base", options.base, "--output", fused)
    evaluate = (
        "evaluate",
        fused,
        "--suite",
        options.config,
        "--baseline",
        options.base,
        "--output",
        evaluation,
        "--jobs",
        2,
    )
    seconds = {
        "finetune three": timed(*coldctl, *finetune),
        "merge": timed(*coldctl, *fuse),
        "evaluate base and fused": timed(*coldctl, *evaluate, COLDCTL_CACHE=str(scratch / "cache")),
    }
    seconds["whole iteration"] = sum(seconds.values())
    results = json.loads((evaluation / "results.json").read_text())["results"]
    return {"seconds": seconds, "scores": {
        "base": {entry["dataset"]: entry["baseline_mean"] for entry in results},
        "fused": {entry["dataset"]: entry["mean"] for entry in results},
    }}  # fmt: skip


def stitched_round(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """A script per step, one after another, each in a process of its own."""
    from coldctl.config import loading

    suite = loading.read(options.config).datasets
    scratch.mkdir()
    seconds = dict.fromkeys(("finetune three", "merge", "evaluate base and fused"), 0.0)
    seen = [dataset for dataset in suite if dataset.role == "seen"]
    for dataset in seen:
        seconds["finetune three"] += timed(
            sys.executable, STITCHED, "finetune", "--base", options.base, "--data", dataset.path, "--config", options.config,
            "--output", scratch / dataset.name,
        )  # fmt: skip
    files = [scratch / dataset.name / "model.safetensors" for dataset in seen]
    models = "".join(f"  - model: {file}\n    parameters: {{weight: 1.0}}\n" for file in files)
    (scratch / "merge.yaml").write_text(f"models:\n{models}merge_method: linear\ndtype: float32\n")
    # mergekit-yaml 0.1.5 ends with a TypeError on a BERT without heads; its sister for bare tensors merges it.
    program = options.mergekit.parent / "mergekit-pytorch"
    seconds["merge"] = timed(program, scratch / "merge.yaml", scratch / "merged", "--quiet")
    shutil.copy(scratch / seen[0].name / "config.json", scratch / "merged")
    scores: dict[str, dict[str, float]] = {"base": {}, "fused": {}}
    for name, model in (("base", options.base), ("fused", scratch / "merged")):
        for dataset in suite:
            file = scratch / f"{name}-{dataset.name}.json"
            seconds["evaluate base and fused"] += timed(
                sys.executable, STITCHED, "probe", "--base", model, "--tokenizer", options.base, "--data", dataset.path,
                "--config", options.config, "--output", file,
            )  # fmt: skip
            scores[name][dataset.name] = json.loads(file.read_text())["accuracy"]
    seconds["whole iteration"] = sum(seconds.values())
    return {"seconds": seconds, "scores": scores}


if __name__ == "__main__":
    main()
