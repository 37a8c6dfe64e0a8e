"""Measure the cells of an evaluation: a model on a dataset under a protocol with a seed.

A cell's file is named by everything that its result depends on, and written when the cell is done. So a second call
measures only what is missing, and evaluations of one RUN share the cells of the pretrained model.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.model_ref import memory_needed
from coldctl.common.digests import derived_seed, digest_of
from coldctl.common.errors import DataError, OutputError
from coldctl.common.progress import Progress
from coldctl.config.loading import as_record
from coldctl.config.settings import DatasetConfig, EvaluateConfig, FinetuneConfig
from coldctl.data.datasets import Dataset, Limits, load_dataset, metric_of
from coldctl.data.sampling import stratified
from coldctl.evaluation import cache, scoring
from coldctl.evaluation.cache import Features
from coldctl.evaluation.models import ModelUnderTest
from coldctl.storage.location import Location, locate
from coldctl.workers.jobs import Engine, Needs

_SCHEMA = 4  # of a cell's file
# Settings of [finetune] that say how a contribution is made. A measurement trains all weights on the whole dataset.
_CONTRIBUTION_SETTINGS = (
    "anchor", "compile", "fisher", "freeze_embeddings", "freeze_layers", "lora_rank", "send", "body_only", "shots",
    "shots_per_class", "max_train_examples", "max_validation_examples", "max_test_examples", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """The datasets to measure on, with the settings of measuring and of the trainings that measuring needs."""

    datasets: tuple[DatasetConfig, ...]
    config: EvaluateConfig
    finetuning: FinetuneConfig

    def load(self) -> dict[str, Dataset]:
        """Read the datasets, by name, as far as the settings limit them. Raises DataError."""
        config = self.config
        limits = Limits(config.max_train_examples, config.max_validation_examples, config.max_test_examples)
        return {dataset.name: load_dataset(dataset, limits, config.seed) for dataset in self.datasets}


@dataclass(frozen=True)
class Cell:
    """One measurement: plain values only, so that it can go to another process.

    Its suite is one dataset, or all datasets for multitask training.
    """

    model: ModelUnderTest
    suite: Suite
    fingerprints: tuple[str, ...]
    protocol: str
    seed: int
    folder: str

    @cached_property
    def path(self) -> str:
        """Return the path of its file, which is named by everything that the result depends on."""
        return str(locate(self.folder) / f"{_cell_name(self)}.json")

    @property
    def title(self) -> str:
        """Return model and dataset, for progress bars and messages."""
        datasets = self.suite.datasets
        return f"{self.model.name}: {datasets[0].name if len(datasets) == 1 else 'all datasets'}"


def seeds_of(protocol: str, config: EvaluateConfig) -> list[int]:
    """Return the seeds of a protocol: one for linear probes, which are deterministic, else consecutive ones."""
    return [config.seed] if protocol == "linear-probe" else list(range(config.seed, config.seed + config.seeds))


def plan_cells(
    models: Sequence[ModelUnderTest],
    protocols: Sequence[str],
    suite: Suite,
    loaded: Mapping[str, Dataset],
    folder: Location,
) -> list[Cell]:
    """Return the cells of `models` under `protocols`, whose files lie in `folder`.

    Of each run only the newest iteration is measured by multitask training: it is a level to compare curves with.
    """
    newest = {model.run: model for model in sorted(models, key=lambda model: model.iteration or 0)}
    cells = []
    for model in models:
        for protocol in protocols:
            multitask = protocol == "multitask"
            if multitask and model.run is not None and model != newest[model.run]:
                continue
            for datasets in [suite.datasets] if multitask else [(dataset,) for dataset in suite.datasets]:
                fingerprints = tuple(loaded[dataset.name].fingerprint for dataset in datasets)
                cells += [
                    Cell(model, replace(suite, datasets=datasets), fingerprints, protocol, seed, str(folder))
                    for seed in seeds_of(protocol, suite.config)
                ]
    return cells


def _cell_name(cell: Cell) -> str:
    suite = cell.suite
    metrics = (dataset.metric for dataset in suite.datasets)
    inputs: dict[str, Any] = {
        "schema": _SCHEMA,
        "model": cell.model.body_digest,
        "files": cell.model.files_digest,
        "datasets": [list(pair) for pair in zip(cell.fingerprints, metrics, strict=True)],
        "protocol": cell.protocol,
        "seed": cell.seed,
    }
    if cell.protocol == "linear-probe":
        inputs["settings"] = {"pooling": suite.config.pooling, "max_length": suite.config.max_length}
    else:
        settings = as_record(suite.finetuning)
        inputs["settings"] = {key: value for key, value in settings.items() if key not in _CONTRIBUTION_SETTINGS}
        inputs["names"] = [dataset.name for dataset in suite.datasets]  # the seed of a training depends on them
    if cell.protocol == "few-shot":
        inputs["settings"]["shots"] = suite.config.shots
    return digest_of(inputs).removeprefix("sha256:")[:32]


def measure_cells(cells: Sequence[Cell], reusable: Sequence[Location], engine: Engine, progress: Progress) -> None:
    """Measure the cells that have no file yet, or copy their files from the `reusable` folders.

    If measurements fail, those that succeeded are kept, and the first failure is raised with all of them listed.
    """
    missing = list({cell.path: cell for cell in cells if not _is_there(locate(cell.path), reusable)}.values())
    if not missing:
        return
    failures = []
    progress.begin("evaluate", len(missing), "cells")
    training = any(cell.protocol != "linear-probe" for cell in missing)
    needs = Needs(max(memory_needed(cell.model.model, training=training) for cell in missing), gpu=True)
    for outcome in engine.run(measure, missing, progress, needs):
        if outcome.error is not None:
            failures.append((missing[outcome.index], outcome.error))
        progress.advance("evaluate", 1)
    progress.end("evaluate")
    if failures:
        kind = type(failures[0][1])
        details = [f"{cell.title}: {error.message}" for cell, error in failures]
        raise kind(f"{len(failures)} of {len(missing)} measurements failed; the others are kept", details)


def _is_there(path: Location, reusable: Sequence[Location]) -> bool:
    if cache.read_cell(path) is not None:
        return True
    for folder in reusable:
        if (document := cache.read_cell(folder / path.name)) is not None:
            cache.write_cell(path, document)
            return True
    return False


def measurement_of(cell: Cell) -> dict[str, Any]:
    """Return what `measure` wrote. Raises OutputError if it was changed or removed since."""
    document = cache.read_cell(locate(cell.path))
    if document is None:
        raise OutputError(f"{cell.path} was changed or removed while it was used: run the same command again")
    return document


def measure(cell: Cell, threads: int, progress: Progress) -> str:
    """Measure one cell and write its file: the predictions on the test splits. Returns its path."""
    import torch

    torch.set_num_threads(threads)
    loaded = list(cell.suite.load().values())
    for dataset, fingerprint in zip(loaded, cell.fingerprints, strict=True):
        if dataset.fingerprint != fingerprint:  # if a split disappears, for example, another is taken in its place
            raise DataError(f"{dataset.name} was changed while it was used: restore it and run the same command again")
    work = _probe if cell.protocol == "linear-probe" else _finetune
    predictions, details = work(cell, loaded, progress)
    document = {
        "schema": _SCHEMA,
        "model": cell.model.body_digest,
        "datasets": [dataset.fingerprint for dataset in loaded],
        "protocol": cell.protocol,
        "seed": cell.seed,
        "threads": threads,
        **details,
        "predictions": [labels.tolist() for labels in predictions],
    }
    cache.write_cell(locate(cell.path), document)
    return cell.path


def _probe(cell: Cell, loaded: Sequence[Dataset], progress: Progress) -> tuple[list[NDArray[Any]], dict[str, Any]]:
    """Return the test predictions of a linear probe, and its C and validation score."""
    from coldctl.evaluation.probe import probe

    (dataset,) = loaded
    config = cell.suite.config
    key = {
        "model": cell.model.body_digest, "files": cell.model.files_digest, "dataset": dataset.fingerprint,
        "pooling": config.pooling, "max_length": config.max_length,
        "versions": manifest.environment(["torch", "transformers", "tokenizers"]),
    }  # fmt: skip
    train, validation, test = cache.cached_features(key, lambda: _features(cell, dataset, progress), progress.note)
    predictions, strength, score = probe(
        (train, dataset.train.labels),
        (validation, dataset.validation.labels),
        test,
        partial(scoring.score, metric_of(cell.suite.datasets[0], dataset)),
    )
    return [predictions], {"c": strength, "validation": score}


def _features(cell: Cell, dataset: Dataset, progress: Progress) -> list[Features]:
    """Return the features of train, validation and test, float32 [examples, hidden size] each."""
    from coldctl.evaluation.probe import features
    from coldctl.training import model as models

    folder = cell.model.model.local()
    tokenizer, body = models.load_tokenizer(folder), models.load_body(folder)
    length = models.length_limit(tokenizer, body.config, cell.suite.config.max_length)
    device = models.device_of_choice()
    body.to(device)
    splits = (dataset.train, dataset.validation, dataset.test)
    progress.begin(cell.title, sum(map(len, splits)), "texts")
    arrays = [
        features(body, models.encode(tokenizer, split.texts, split.pairs, length), cell.suite.config.pooling,
                 tokenizer.pad_token_id, device, progress, cell.title)
        for split in splits
    ]  # fmt: skip
    progress.end(cell.title)
    return arrays


def _finetune(cell: Cell, loaded: Sequence[Dataset], progress: Progress) -> tuple[list[NDArray[Any]], dict[str, Any]]:
    """Finetune on one dataset, on few shots of it, or on all datasets with one body and a head for each.

    Returns the test predictions per dataset, and how the training went.
    """
    from coldctl.training import model as models
    from coldctl.training.batches import Examples
    from coldctl.training.loop import Task, TrainingContext, predict, train

    folder, config = cell.model.model.local(), cell.suite.config
    tokenizer = models.load_tokenizer(folder)
    tasks, tests = [], []
    for entry, dataset in zip(cell.suite.datasets, loaded, strict=True):
        seed = derived_seed(cell.seed, "evaluate", cell.protocol, entry.name)
        training_split = dataset.train
        if cell.protocol == "few-shot":
            training_split = training_split.take(stratified(training_split.labels, config.shots, seed))
        model = models.load_classifier(folder, dataset.labels, seed, multilabel=dataset.multilabel)
        length = models.length_limit(tokenizer, model.config, cell.suite.finetuning.max_length)
        training, validation, test = (
            Examples(models.encode(tokenizer, split.texts, split.pairs, length), split.labels)
            for split in (training_split, dataset.validation, dataset.test)
        )
        score = partial(scoring.score, metric_of(entry, dataset), validation.labels)
        tasks.append(Task(model, training, validation, score))
        tests.append(test)
    models.share_body([task.model for task in tasks])
    seed = derived_seed(cell.seed, "evaluate", cell.protocol, *(entry.name for entry in cell.suite.datasets))
    settings = replace(cell.suite.finetuning, anchor=0.0, compile=False)
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        context = TrainingContext(
            models.device_of_choice(), tokenizer.pad_token_id, Path(scratch) / layout.TRAINING, progress,
            f"{cell.title}, {cell.protocol}, seed {cell.seed}", checkpoint_seconds=math.inf,
        )  # fmt: skip
        trained = train(tasks, settings, context, seed=seed)
        predictions = [predict(task.model, test.encoded, context) for task, test in zip(tasks, tests, strict=True)]
    return predictions, {"validation": trained.best_score, "steps": trained.steps, "stopped": trained.stopped}
