"""Which outer step serves best? Rules for the length and method of the fuse step, measured on real datasets.

    .venv/bin/python benchmarks/outer_step.py DATA_FOLDER --base assets/demo/base --scratch runs/outer-step

DATA_FOLDER holds one folder per dataset with train, validation and test files. Contributors finetune the seen ones;
every rule fuses the same contributions of iteration 1, so iteration 1 compares rules alone. Rules named with --iterate
go on for further iterations, each from its own fused models. Beside them stands multitask training of one body on the
pooled data, with as many steps as the contributors together took in that many iterations. Scores are linear probes: rules
are to be chosen by the validation columns, the test columns report. With --finetune, models are also finetuned on few
examples of each dataset. Everything is resumable: what is complete in --scratch is not repeated.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

SEEN = (
    "trec_coarse", "rotten_tomatoes", "tweet_ev_emotion", "financial_phrasebank", "esnli", "qqp", "banking77",
    "query_wellformed",
)  # fmt: skip
UNSEEN = ("poem_sentiment", "clickbait", "rte", "tweet_ev_offensive")

RULES: dict[str, str] = {
    "mean": "",
    "mean, 2": "--scale 2",
    "mean, 3": "--scale 3",
    "mean, 4": "--scale 4",
    "mean, 6": "--scale 6",
    "mean, auto": "--scale auto",
    "mean, 1.5 auto": "--scale 1.5*auto",
    "mean, 2 auto": "--scale 2*auto",
    "median, auto": "--method median --scale auto",
    "trimmed mean, auto": "--method trimmed-mean --scale auto",
    "ties, auto": "--method ties --scale auto",
    "dare, auto": "--method dare --scale auto",
    "geometric median, auto": "--method geometric-median --scale auto",
    "model stock": "--method model-stock",
    "nesterov 0.7, 0.9": "--outer-optimizer nesterov --outer-lr 0.7 --outer-momentum 0.9",
    "nesterov 2, 0.5": "--outer-optimizer nesterov --outer-lr 2 --outer-momentum 0.5",
    "sgd 2, 0.5": "--outer-optimizer sgd --outer-lr 2 --outer-momentum 0.5",
    "adam 0.001": "--outer-optimizer adam --outer-lr 0.001",
}


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument(
        "--rules", default=",".join(RULES).replace(", ", "; "), help="separated by commas, `; ` inside a name"
    )
    parser.add_argument("--iterate", default="", help="rules that go on after iteration 1, likewise")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--multitask", default="1,3", help="iterations' worth of steps, separated by commas")
    parser.add_argument("--finetune", default="", help="models to finetune: RULE@ITERATION or multitask@N, likewise")
    parser.add_argument("--finetune-examples", type=int, default=300)
    options = parser.parse_args()
    scratch: Path = options.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    suite = scratch / "suite.toml"
    suite.write_text(suite_text(options))
    coldctl("plan", scratch / "run", "--config", suite)  # in a run evaluations share their cells
    first = scratch / "contributions"
    coldctl("finetune", "--suite", suite, "--base", options.base, "--output", first, "--jobs", 2)
    rows = [("pretrained", 0, *score(scratch, suite, options.base, options.base))]
    table(rows)
    for rule in names(options.rules):
        rows.append((rule, 1, *step(options, suite, rule, 1, options.base, first)))
        table(rows)
    for rule in names(options.iterate):
        for iteration in range(1, options.iterations + 1):
            place = scratch / folder_of(rule)
            base = options.base if iteration == 1 else place / f"fused-{iteration - 1}"
            contributions = first if iteration == 1 else place / f"contributions-{iteration}"
            if iteration > 1:
                coldctl(
                    "finetune",
                    "--suite",
                    suite,
                    "--base",
                    base,
                    "--output",
                    contributions,
                    "--jobs",
                    2,
                    "--seed",
                    iteration,
                )
            rows.append((rule, iteration, *step(options, suite, rule, iteration, base, contributions)))
            table(rows)
    for worth in names(options.multitask):
        model = multitask(options, suite, int(worth))
        rows.append(("multitask, pooled data", int(worth), *score(scratch, suite, model, options.base)))
        table(rows)
    if options.finetune:
        finetuned(options, names(options.finetune))


def step(
    options: argparse.Namespace, suite: Path, rule: str, iteration: int, base: Path, contributions: Path
) -> tuple[float, float, float, float, float]:
    """Fuse under a rule and score the result: λ, then validation and test means over seen and unseen datasets."""
    fused = options.scratch / folder_of(rule) / f"fused-{iteration}"
    coldctl("fuse", contributions, "--base", base, "--output", fused, *shlex.split(RULES[rule]))
    return score(options.scratch, suite, fused, options.base)


def multitask(options: argparse.Namespace, suite: Path, worth: int) -> Path:
    """Train one body with a head per seen dataset, for `worth` iterations' epochs, and save it."""
    target: Path = options.scratch / "multitask" / f"fused-{worth}"
    if (target / "model.safetensors").exists():
        return target
    import torch

    from coldctl.common.progress import SILENT
    from coldctl.config import loading
    from coldctl.config.settings import FinetuneConfig
    from coldctl.data.datasets import Limits, load_dataset, metric_of
    from coldctl.evaluation import scoring
    from coldctl.training import model as models
    from coldctl.training.batches import Examples
    from coldctl.training.loop import Task, TrainingContext, train

    file = loading.read(suite)
    settings = loading.resolve(FinetuneConfig, file, {"epochs": options.epochs * worth})
    limits = Limits(settings.max_train_examples, settings.max_validation_examples, settings.max_test_examples)
    tokenizer = models.load_tokenizer(options.base)
    tasks = []
    for entry in file.datasets:
        if entry.role == "seen":
            dataset = load_dataset(entry, limits, settings.seed)
            model = models.load_classifier(options.base, dataset.labels, settings.seed)
            training, validation = (
                Examples(models.encode(tokenizer, split.texts, split.pairs, settings.max_length), split.labels)
                for split in (dataset.train, dataset.validation)
            )
            measure = partial(scoring.score, metric_of(entry, dataset), validation.labels)
            tasks.append(Task(model, training, validation, measure))
    models.share_body([task.model for task in tasks])
    context = TrainingContext(
        torch.device("cpu"), tokenizer.pad_token_id, options.scratch / f".multitask-{worth}", SILENT, "multitask"
    )
    train(tasks, settings, context, seed=0)
    target.parent.mkdir(exist_ok=True)
    unfinished = target.parent / ".unfinished"
    body = models.body_of(tasks[0].model)
    body.save_pretrained(unfinished)  # type: ignore[operator]
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)
    return target


def finetuned(options: argparse.Namespace, wanted: Sequence[str]) -> None:
    """Finetune models on few examples of every dataset, two seeds, and print the gains over the pretrained model."""
    suite = options.scratch / "finetune.toml"
    text = suite_text(options).replace(
        f"[evaluate]\nmax_length = 96\nmax_train_examples = {options.examples}",
        f"[evaluate]\nmax_length = 96\nmax_train_examples = {options.finetune_examples}",
    )
    suite.write_text(text)
    print("\n| finetuned from | seen | gain | unseen | gain |\n| --- | --: | --- | --: | --- |")
    for name in wanted:
        rule, iteration = name.rsplit("@", 1)
        model = options.scratch / folder_of(rule) / f"fused-{iteration}"
        output = options.scratch / "run" / "evaluations" / f"finetuned-{model.parent.name}-{iteration}"
        coldctl(
            "evaluate", model, "--baseline", options.base, "--suite", suite, "--output", output, "--protocol", "finetune",
            "--seeds", 2, "--jobs", 2,
        )  # fmt: skip
        averages = {entry["group"]: entry for entry in json.loads((output / "results.json").read_text())["averages"]}
        cells = [f"{name}"]
        for group in ("seen", "unseen"):
            entry = averages[group]
            low, high = entry["gain_interval"]
            cells += [f"{entry['mean']:.1f}", f"{entry['gain']:+.1f} [{low:+.1f}, {high:+.1f}]"]
        print(f"| {' | '.join(cells)} |", flush=True)


def score(scratch: Path, suite: Path, model: Path, base: Path) -> tuple[float, float, float, float, float]:
    """Linear probes of one model: effective λ, validation seen and unseen, test seen and unseen, in percent."""
    output = scratch / "run" / "evaluations" / f"{model.parent.name}-{model.name}"
    coldctl("evaluate", model, "--baseline", base, "--suite", suite, "--output", output, "--jobs", 2)
    document = json.loads((model / "coldctl.json").read_text()) if (model / "coldctl.json").exists() else {}
    results = json.loads((output / "results.json").read_text())
    tests = {entry["dataset"]: entry["mean"] for entry in results["results"]}
    digest = results["models"][0]["body_digest"]
    validations = {name: validation_score(output, digest, name) for name in tests}
    means = [
        float(np.mean([found[name] for name in group])) for found in (validations, tests) for group in (SEEN, UNSEEN)
    ]
    return (document.get("config", {}).get("effective_scale", float("nan")), means[0], means[1], means[2], means[3])


def validation_score(output: Path, digest: str, name: str) -> float:
    """The validation score in the cell of one model and dataset."""
    fingerprints = json.loads((output / "results.json").read_text())["fingerprints"]
    for path in (output.parents[1] / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        if cell["model"] == digest and cell["datasets"] == [fingerprints[name]]:
            return float(cell["validation"])
    raise SystemExit(f"no cell of {name} in {output}")


def coldctl(*arguments: object) -> None:
    """Run one command, as a user would; end here if it fails."""
    line = [sys.executable, "-m", "coldctl", *map(str, arguments), "--quiet"]
    if subprocess.run(line, check=False).returncode:
        raise SystemExit(f"failed: {shlex.join(line)}")


def names(text: str) -> list[str]:
    """Rule names from a command line."""
    return [part.strip().replace("; ", ", ") for part in text.split(",") if part.strip()]


def folder_of(rule: str) -> str:
    """A rule's folder in the scratch directory."""
    return rule.replace(", ", "-").replace(" ", "-")


def suite_text(options: argparse.Namespace) -> str:
    """The suite of all datasets with the caps of this benchmark."""
    text = (
        f'[run]\nbase = "{options.base.resolve()}"\n'
        f"[finetune]\nepochs = {options.epochs}\nbatch_size = 32\nlearning_rate = {options.learning_rate}\nmax_length = 96\n"
        f"max_train_examples = {options.examples}\nmax_validation_examples = 200\nmax_test_examples = 1\n"
        f"[evaluate]\nmax_length = 96\nmax_train_examples = {options.examples}\n"
        "max_validation_examples = 300\nmax_test_examples = 500\n"
    )
    for name in (*SEEN, *UNSEEN):
        role = "seen" if name in SEEN else "unseen"
        text += f'[[dataset]]\nname = "{name}"\npath = "{(options.data / name).resolve()}"\nrole = "{role}"\n'
    return text


def table(rows: Sequence[tuple[str, int, float, float, float, float, float]]) -> None:
    """Print what is known so far as a Markdown table."""
    print("\n| rule | iteration | λ | validation seen | unseen | test seen | unseen |\n|---|--:|--:|--:|--:|--:|--:|")
    for rule, iteration, scale, *scores in rows:
        numbers = " | ".join(f"{value:.1f}" for value in scores)
        print(f"| {rule} | {iteration} | {f'{scale:.2f}' if scale > 0 else '–'} | {numbers} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
