"""What do poisoned contributions do to a fused model, and which settings of `coldctl fuse` keep them out?

    .venv/bin/python benchmarks/poison.py --scratch runs/poison
    .venv/bin/python benchmarks/poison.py --scratch runs/poison --data DATA_FOLDER --only a,b,c,d,e,f,g,h

Eight contributors finetune for real; then 1, 2 and 3 of them (of as many datasets as can be) send something else, as
checkpoints on disk with manifests of their own making, so that every digest holds. All is fused by `coldctl fuse` and
measured by the linear probes of `coldctl evaluate` against the mean without an attack. DATA_FOLDER holds one folder per
dataset with train, validation and test files; without it the demo's four datasets are shared out, each to two
contributors. Everything is resumable: what is complete in --scratch is not repeated.

The attackers know what the honest ones send and work together. d is an update, m and s are the mean and the standard
deviation of the honest updates, per coordinate:

- not-a-number: one value of one tensor; sign-flipped: -d; 100-fold: 100 d; random: Gaussian, as long as d, or 100 times that
- label-flipped: finetuned for real on wrong labels (with two classes on half of them: all flipped are the same classes)
- small bias: m - 1.5 s by all ("a little is enough", arXiv 1902.06156); inner product: -e m (arXiv 1903.03936), for e = 0.5
  and as long as an honest update
- hidden: as the long inner product, but twice as long, and mixed with noise until it is near the limits of --screen, which
  depend on how far the honest updates are spread: it may pass, or be dropped
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from coldctl.artifacts import layout, manifest
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from coldctl.checkpoints.digests import body_digest, outside_body
from coldctl.common.digests import derived_seed
from coldctl.config import loading
from coldctl.config.settings import EvaluateConfig, FinetuneConfig, contributors_of
from coldctl.data.datasets import Dataset, Limits, load_dataset, metric_of
from coldctl.evaluation import scoring
from coldctl.storage.local import LocalFolder

DEMO = ("amazon", "movies", "tweets", "nyt")
METHODS: dict[str, str] = {
    "mean": "",
    "mean, screened": "--screen reject",
    "median": "--method median",
    "trimmed mean": "--method trimmed-mean --trim 0.25",
    "multi-krum": "--method multi-krum --byzantine 2",
    "multi-krum, screened": "--method multi-krum --byzantine 2 --screen reject",
    "geometric median": "--method geometric-median",
}
SEED = 0
HIDDEN_COSINE = -0.15  # to each honest update, and
HIDDEN_LENGTH = 2.0  # times the median: among eight contributions of usual spread --screen allows a little more

Body = dict[str, NDArray[np.float32]]


def main() -> None:
    """Train, poison, fuse, measure; print the tables after each attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="default: the demo's datasets, shared out")
    parser.add_argument("--only", default="", help="names of the eight datasets in DATA, separated by commas")
    parser.add_argument("--base", type=Path, default=Path("assets/demo/base"))
    parser.add_argument("--examples", type=int, default=1000, help="training examples of a contributor")
    parser.add_argument("--probe-examples", type=int, default=400, help="training examples of a probe")
    parser.add_argument("--test-examples", type=int, default=500)
    parser.add_argument("--attackers", default="2,1,3")
    parser.add_argument("--attacks", default="; ".join(ATTACKS), help="separated by semicolons")
    parser.add_argument("--methods", default="; ".join(METHODS), help="likewise")
    parser.add_argument(
        "--fuse", default="", metavar="FLAGS", help="more flags for every fuse, such as --scale 1.5*auto"
    )
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    scratch: Path = options.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    suite = scratch / "suite.toml"
    suite.write_text(suite_text(options))
    bench = Bench(options, suite)
    bench.train()
    bench.measure("no attack", 0)
    for attack in names(options.attacks):
        for count in map(int, options.attackers.split(",")):
            bench.measure(attack, count)
        bench.report()


class Bench:
    """The honest contributions, and what was measured so far."""

    def __init__(self, options: argparse.Namespace, suite: Path) -> None:
        self.options, self.suite = options, suite
        self.scratch: Path = options.scratch
        self.base: Path = options.base
        self.honest = self.scratch / "contributions"
        # The first are the attackers: one of each dataset before a second one of any, so that none is theirs alone.
        contributors = contributors_of(loading.read(suite).datasets)
        self.contributors = sorted(contributors, key=lambda item: item[1].part)
        self.names = [name for name, _ in self.contributors]
        self.methods = names(options.methods)
        self.cells: dict[tuple[str, int, str], dict[str, Any]] = {}
        self.scorer = Scorer(loading.read(suite), self.base, self.scratch / "predictions")

    def train(self) -> None:
        """All contributions, and those of the attackers on wrong labels."""
        if not all(layout.is_complete(self.honest / name) for name in self.names):
            coldctl(
                "finetune", "--suite", self.suite, "--base", self.base, "--output", self.honest, "--jobs", self.options.jobs
            )  # fmt: skip
        settings = loading.resolve(FinetuneConfig, loading.read(self.suite), {})
        limits = Limits(settings.max_train_examples, settings.max_validation_examples, settings.max_test_examples)
        for name, entry in self.contributors[: max(map(int, self.options.attackers.split(",")))]:
            target = self.scratch / "flipped" / name
            if not layout.is_complete(target):
                folder = self.scratch / "flipped-data" / name
                flip(load_dataset(entry, limits, settings.seed), folder, derived_seed(SEED, "flip", name))
                coldctl(
                    "finetune", folder, "--config", self.suite, "--base", self.base, "--output", target, "--name", name
                )  # fmt: skip

    def measure(self, attack: str, count: int) -> None:
        """Poison, fuse by every method, and score what no earlier fuse has given."""
        key = (attack, count)
        store = self.scratch / "cells" / folder_of(f"{attack} {count} {self.options.fuse}")
        store.mkdir(parents=True, exist_ok=True)
        missing = [method for method in self.methods if not (store / f"{folder_of(method)}.json").exists()]
        if missing:
            parts = self.poisoned(attack, count)
            for method in missing:
                cell = self.fused(store / "fused", parts, method)
                (store / f"{folder_of(method)}.json").write_text(json.dumps(cell))
            shutil.rmtree(self.scratch / "poisoned", ignore_errors=True)
        for method in self.methods:
            self.cells[(*key, method)] = json.loads((store / f"{folder_of(method)}.json").read_text())

    def poisoned(self, attack: str, count: int) -> list[Path]:
        """What is offered: honest contributions, and in place of the first `count` what the attackers send."""
        parts = [self.honest / name for name in self.names]
        if attack == "label-flipped":
            return [self.scratch / "flipped" / name for name in self.names[:count]] + parts[count:]
        if not count:
            return parts
        base = body_of(self.base)
        updates = [difference(body_of(path), base) for path in parts]
        made = ATTACKS[attack](updates[:count], updates[count:], np.random.default_rng(SEED))  # type: ignore[misc]
        forged = [self.scratch / "poisoned" / name for name in self.names[:count]]
        for source, target, update in zip(parts, forged, made, strict=False):
            forge(source, target, {name: base[name] + update[name] for name in base})
        return forged + parts[count:]

    def fused(self, target: Path, parts: Sequence[Path], method: str) -> dict[str, Any]:
        """One fuse: whom it dropped, how far it is from the mean without an attack, and its scores; None if it refused."""
        shutil.rmtree(target, ignore_errors=True)
        flags = shlex.split(f"{METHODS[method]} {self.options.fuse}")
        line = ["fuse", *parts, "--base", self.base, "--output", target, "--json", *flags]
        ran = subprocess.run([*COLDCTL, *map(str, line)], check=False, capture_output=True, text=True)
        if ran.returncode == 2:
            return {"refused": json.loads(ran.stdout)["details"]}
        if ran.returncode:
            raise SystemExit(ran.stderr)
        document = json.loads(ran.stdout)
        clean = self.scratch / "clean" / folder_of(f"mean {self.options.fuse}")
        if not clean.exists():  # the first of all: no attack, the mean
            shutil.copytree(target, clean)
        base = body_of(self.base)
        wanted, found = (difference(body_of(path), base) for path in (clean, target))
        rejected = {item["name"] for item in document["contributions"] if item["status"] == "rejected"}
        return {
            "rejected": sorted(rejected),
            "distance": norm(difference(found, wanted)) / norm(wanted),
            "progress": inner(found, wanted) / norm(wanted) ** 2,
            **self.scorer.score(target, clean),
        }

    def report(self) -> None:
        """Print what is known so far: scores, weights, and who was dropped."""
        clean = self.scratch / "clean" / folder_of(f"mean {self.options.fuse}")
        scores = [self.scorer.score(model, clean)["mean"] for model in (clean, self.base)]
        print(f"\nThe mean without an attack scores {scores[0]:.1f}, the base {scores[1]:.1f}.")
        print("Points lost to that mean (- is a gain), with 95 % intervals:\n")
        self.table(lambda cell, _: lost(cell))
        print("\nThe share of its step that is made, and how far off the result is, in lengths of that step:\n")
        self.table(lambda cell, _: f"{cell['progress']:.2f}, {cell['distance']:.2f}")
        print("\nDropped, attackers and honest ones:\n")
        self.table(lambda cell, count: self.dropped(cell["rejected"], count))
        sys.stdout.flush()

    def dropped(self, rejected: Sequence[str], count: int) -> str:
        """How many of the attackers, and how many of the others."""
        caught = len(set(rejected) & set(self.names[:count]))
        return f"{caught}, {len(rejected) - caught}"

    def table(self, text: Callable[[dict[str, Any], int], str]) -> None:
        """One row per attack and number of attackers, one column per method."""
        print(f"| attack | of 8 | {' | '.join(self.methods)} |\n|---|--:|{'---|' * len(self.methods)}")
        rows = dict.fromkeys(key[:2] for key in self.cells)
        order = list(dict.fromkeys(attack for attack, _ in rows))
        for attack, count in sorted(rows, key=lambda row: (order.index(row[0]), row[1])):
            cells = [self.cells[(attack, count, method)] for method in self.methods]
            words = ["refused" if "refused" in cell else text(cell, count) for cell in cells]
            print(f"| {attack} | {count} | {' | '.join(words)} |")


class Scorer:
    """The linear probes of `coldctl evaluate`, in this process: texts are read and tokenized once for all models."""

    def __init__(self, file: loading.ConfigFile, base: Path, folder: Path) -> None:
        self.settings = loading.resolve(EvaluateConfig, file, {})
        self.datasets, self.base, self.folder = file.datasets, base, folder
        self.loaded: list[tuple[Dataset, list[Any]]] = []

    def load(self) -> None:
        """Read the suite's datasets, tokenized by the base's tokenizer."""
        from coldctl.training import model as models

        limits = Limits(
            self.settings.max_train_examples, self.settings.max_validation_examples, self.settings.max_test_examples
        )
        self.tokenizer = models.load_tokenizer(self.base)
        for entry in self.datasets:
            dataset = load_dataset(entry, limits, self.settings.seed)
            splits = (dataset.train, dataset.validation, dataset.test)
            encoded = [
                models.encode(self.tokenizer, split.texts, split.pairs, self.settings.max_length) for split in splits
            ]
            self.loaded.append((dataset, encoded))

    def score(self, model: Path, clean: Path) -> dict[str, Any]:
        """The mean score over the suite, and the gain over `clean` with its 95 % interval."""
        if not self.loaded:
            self.load()
        scores, gains, drawn = [], [], []
        for entry, (dataset, _), new, old in zip(
            self.datasets, self.loaded, self.predictions(model), self.predictions(clean), strict=True
        ):
            truth, metric = dataset.test.labels, metric_of(entry, dataset)
            scores.append(scoring.score(metric, truth, new))
            gains.append(scores[-1] - scoring.score(metric, truth, old))
            outcome = scoring.Outcome(metric, truth, new[None], old[None])
            drawn.append(scoring.resampled_gains(outcome, derived_seed(SEED, "bootstrap", dataset.name)))
        gain = scoring.average(gains, drawn, certain=True)
        return {"mean": float(np.mean(scores)), "gain": gain.gain, "gain_interval": list(gain.interval)}

    def predictions(self, model: Path) -> list[NDArray[Any]]:
        """What the probe of each dataset predicts on its test split; computed once per body."""
        import torch

        from coldctl.common.progress import SILENT
        from coldctl.evaluation.probe import features, probe
        from coldctl.training import model as models

        known = self.folder / f"{body_digest(opened(model)).removeprefix('sha256:')}.json"
        if not known.exists():
            body, found = models.load_body(model), []
            for entry, (dataset, encoded) in zip(self.datasets, self.loaded, strict=True):
                train, validation, test = (
                    features(body, part, "mean", self.tokenizer.pad_token_id, torch.device("cpu"), SILENT, "")
                    for part in encoded
                )
                metric = partial(scoring.score, metric_of(entry, dataset))
                answers, _, _ = probe(
                    (train, dataset.train.labels), (validation, dataset.validation.labels), test, metric
                )
                found.append(answers.tolist())
            known.parent.mkdir(exist_ok=True)
            known.write_text(json.dumps(found))
        return [np.asarray(part) for part in json.loads(known.read_text())]


def lost(cell: dict[str, Any]) -> str:
    """Points lost, with the interval; no minus before a zero."""
    points = [0.0 - round(value, 1) for value in (cell["gain"], *reversed(cell["gain_interval"]))]
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)


# Updates --------------------------------------------------------------------------------------------------------


def norm(update: Body) -> float:
    """The length of an update over all tensors."""
    return float(np.sqrt(inner(update, update)))


def inner(one: Body, other: Body) -> float:
    """The inner product of two updates over all tensors."""
    return float(sum(np.vdot(one[name].astype(np.float64), other[name]) for name in one))


def times(factor: float, update: Body) -> Body:
    """An update, longer, shorter or turned round."""
    return {name: np.float32(factor) * part for name, part in update.items()}


def plus(one: Body, other: Body) -> Body:
    """The sum of two updates."""
    return {name: one[name] + other[name] for name in one}


def difference(one: Body, other: Body) -> Body:
    """One body less another."""
    return {name: one[name] - other[name] for name in other}


def mean(updates: Sequence[Body]) -> Body:
    """The mean, per coordinate."""
    return {name: np.mean([update[name] for update in updates], axis=0) for name in updates[0]}


def deviation(updates: Sequence[Body]) -> Body:
    """The standard deviation, per coordinate."""
    return {name: np.std([update[name] for update in updates], axis=0) for name in updates[0]}


def noise(like: Body, rng: np.random.Generator, length: float) -> Body:
    """Gaussian noise of a length."""
    made = {name: rng.standard_normal(part.shape, np.float32) for name, part in like.items()}
    return times(length / norm(made), made)


# Attacks: from the attackers' own honest updates and those of the others to what the attackers send ---------------------


def not_a_number(own: Sequence[Body], others: Sequence[Body], rng: np.random.Generator) -> list[Body]:  # noqa: ARG001
    """One value of one tensor."""
    made = [times(1, update) for update in own]
    for update in made:
        next(iter(update.values())).reshape(-1)[0] = np.nan
    return made


def multiplied(factor: float) -> "Make":
    """Each its own update, times a factor."""
    return lambda own, others, rng: [times(factor, update) for update in own]  # noqa: ARG005


def random(factor: float) -> "Make":
    """Noise, `factor` times as long as the own update."""
    return lambda own, others, rng: [noise(update, rng, factor * norm(update)) for update in own]  # noqa: ARG005


def small_bias(own: Sequence[Body], others: Sequence[Body], rng: np.random.Generator) -> list[Body]:  # noqa: ARG001
    """Within the honest ones' spread in every coordinate, the same by all."""
    return [plus(mean(others), times(-1.5, deviation(others)))] * len(own)


def inner_product(own: Sequence[Body], others: Sequence[Body], rng: np.random.Generator) -> list[Body]:  # noqa: ARG001
    """Half of the honest mean, turned round."""
    return [times(-0.5, mean(others))] * len(own)


def long_inner_product(own: Sequence[Body], others: Sequence[Body], rng: np.random.Generator) -> list[Body]:  # noqa: ARG001
    """The honest mean turned round, as long as an honest update."""
    honest = mean(others)
    return [times(-float(np.median([norm(item) for item in others])) / norm(honest), honest)] * len(own)


def hidden(own: Sequence[Body], others: Sequence[Body], rng: np.random.Generator) -> list[Body]:
    """About as much against the honest mean, and as long, as the rules of --screen let pass."""
    honest = mean(others)
    length = HIDDEN_LENGTH * float(np.median([norm(item) for item in others]))
    usual = float(np.median([inner(item, honest) / norm(item) for item in others])) / norm(honest)
    share = HIDDEN_COSINE / usual  # the cosine to the mean that gives this cosine to the median honest update
    made = []
    for update in own:
        against = times(length * share / norm(honest), honest)
        made.append(plus(against, noise(update, rng, length * float(np.sqrt(1 - share**2)))))
    return made


Make = Callable[[Sequence[Body], Sequence[Body], np.random.Generator], list[Body]]
ATTACKS: dict[str, Make | None] = {
    "not-a-number": not_a_number,
    "sign-flipped": multiplied(-1),
    "100-fold": multiplied(100),
    "random": random(1),
    "random, 100-fold": random(100),
    "label-flipped": None,  # finetuned, not computed
    "small bias": small_bias,
    "inner product, 0.5": inner_product,
    "inner product, long": long_inner_product,
    "hidden": hidden,
}


# Files ----------------------------------------------------------------------------------------------------------


def opened(folder: Path) -> Checkpoint:
    """A checkpoint by its headers."""
    return open_checkpoint(LocalFolder(folder), folder.name)


def body_of(folder: Path) -> Body:
    """A checkpoint's floating body tensors."""
    checkpoint = opened(folder)
    return {name: checkpoint.read(name) for name, tensor in checkpoint.body.items() if tensor.floating}


def forge(source: Path, target: Path, body: Body) -> None:
    """A contribution with another body, whose manifest says so."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    prefix = opened(source).prefix
    tensors = load_file(source / layout.WEIGHTS)
    tensors.update({prefix + name: part for name, part in body.items() if prefix + name in tensors})
    save_file(tensors, target / layout.WEIGHTS, {"format": "pt"})
    document = manifest.read(source)
    document["body_digest"], document["outside_body"] = body_digest(opened(target)), outside_body(opened(target))
    manifest.write(target, document)


def flip(dataset: Dataset, folder: Path, seed: int) -> None:
    """The dataset with wrong labels: another class, drawn at random; with two classes, half of them are flipped."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    count = len(dataset.labels)
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        shift = rng.integers(1, count, len(split)) if count > 2 else rng.integers(0, 2, len(split))
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for index, label in enumerate((split.labels + shift) % count):
                row = {"text": split.texts[index], "label": dataset.labels[int(label)]}
                pair = {"text_pair": split.pairs[index]} if split.pairs is not None else {}
                file.write(json.dumps({**row, **pair}) + "\n")


COLDCTL = [sys.executable, "-m", "coldctl"]


def coldctl(*arguments: object) -> None:
    """Run one command, as a user would; end here if it fails."""
    line = [*COLDCTL, *map(str, arguments), "--quiet"]
    if subprocess.run(line, check=False, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"failed: {shlex.join(line)}")


def suite_text(options: argparse.Namespace) -> str:
    """The suite: eight contributors, with the caps of this benchmark."""
    text = (
        f'[run]\nbase = "{options.base.resolve()}"\n'
        "[finetune]\nepochs = 2\nbatch_size = 32\nlearning_rate = 5e-5\nmax_length = 64\n"
        f"max_train_examples = {options.examples}\nmax_validation_examples = 100\nmax_test_examples = 1\n"
        f"[evaluate]\nmax_length = 64\nmax_train_examples = {options.probe_examples}\n"
        f"max_validation_examples = {options.probe_examples // 2}\n"
        f"max_test_examples = {options.test_examples}\n"
    )
    folder: Path = options.data or options.base.parent
    chosen = [part for part in options.only.split(",") if part] or (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if options.data else DEMO
    )
    shared = "" if options.data else "contributors = 2\n"
    for name in chosen:
        text += f'[[dataset]]\nname = "{name}"\npath = "{(folder / name).resolve()}"\nrole = "seen"\n{shared}'
    return text


def names(text: str) -> list[str]:
    """What a command line lists between semicolons."""
    return [part.strip() for part in text.split(";") if part.strip()]


def folder_of(name: str) -> str:
    """A name as a folder's."""
    return name.strip().replace(", ", "-").replace(" ", "-").replace("*", "x")


if __name__ == "__main__":
    main()
