"""`coldctl evaluate`: is a model a better base model than the baseline? Measured per dataset and on average.

Every cell (model, dataset, protocol, seed) is a file that is written when it is done, named by what it depends
on, so a second call computes only what is missing. Gains are paired: same splits and seeds for model and
baseline.
"""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.core import data, layout, manifest, output, run, scoring
from coldctl.core.candidates import free_names
from coldctl.core.checkpoint import body_digest, open_checkpoint
from coldctl.core.config import (
    PROTOCOLS,
    DatasetConfig,
    EvaluateConfig,
    FinetuneConfig,
    as_record,
    derived_seed,
    identity,
)
from coldctl.core.errors import ConfigError, ModelError
from coldctl.core.progress import Progress
from coldctl.core.reference import Model, resolve
from coldctl.core.report import gain_chart, markdown
from coldctl.engines import local

SCHEMA = 1  # of results.json
CELL_SCHEMA = 2
# Settings of [finetune] that say how a contribution is made; a measurement trains everything, freely.
_CONTRIBUTORS_OWN = (
    "anchor", "compile", "fisher", "freeze_embeddings", "freeze_layers", "lora_rank", "shots", "shots_per_class",
    "max_train_examples", "max_validation_examples", "max_test_examples", "seed",
)  # fmt: skip
_GROUPS = ("all", "seen", "unseen")


@dataclass(frozen=True)
class Contender:
    """A model under test, with the digest of its body."""

    name: str
    model: Model
    body_digest: str
    files_digest: str  # of config and tokenizer, which decide what the same weights compute


@dataclass(frozen=True)
class Cell:
    """One measurement to be made: plain values only, so that it can go to another process.

    It is about one dataset; multitask training is one measurement of all of them.
    """

    path: str
    contender: Contender
    datasets: tuple[DatasetConfig, ...]
    protocol: str
    seed: int
    evaluation: EvaluateConfig
    finetuning: FinetuneConfig

    @property
    def title(self) -> str:
        """Model and dataset, for progress bars and messages."""
        subject = self.datasets[0].name if len(self.datasets) == 1 else "all datasets"
        return f"{self.contender.name}: {subject}"


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found, as `results.json` holds it, and whether it already stood there."""

    path: Path
    results: dict[str, Any]
    unchanged: bool


def evaluate(
    models: Sequence[Model],
    baseline: Model,
    datasets: Sequence[DatasetConfig],
    destination: Path,
    config: EvaluateConfig,
    finetuning: FinetuneConfig,
    *,
    jobs: int,
    overwrite: bool,
    progress: Progress,
) -> Evaluated:
    """Measure `models` against `baseline` on the suite and write `results.json`, `report.md` and `gain.png`.

    Raises ConfigError, DataError, ModelError or OutputError. If cells fail, those that succeeded are kept, and
    the first failure is raised with all of them listed.
    """
    if not datasets:
        raise ConfigError("the suite has no dataset: add [[dataset]] tables to it")
    places = [model.place for model in (baseline, *models)]
    output.refuse_overlap(destination, [*places, *(item.path for item in datasets if not data.is_hub(item.path))])
    loaded = {dataset.name: _load(dataset, config) for dataset in datasets}
    contenders = _contenders([baseline, *models])
    measured = [[item.name, item.body_digest, item.files_digest] for item in contenders]
    key = identity(
        "evaluate", config, finetuning=as_record(finetuning), models=measured,
        datasets=[[item.name, item.role, item.metric, loaded[item.name].fingerprint] for item in datasets],
    )  # fmt: skip
    if output.is_done(destination, key, overwrite=overwrite):
        results = json.loads((destination / layout.RESULTS).read_text(encoding="utf-8"))
        return Evaluated(destination, results, unchanged=True)
    for dataset in datasets:
        for sentence in loaded[dataset.name].overlaps():
            progress.note(f"{dataset.name}: {sentence}")
    with output.writing(destination, key, overwrite=overwrite) as unfinished:
        folder = _cell_folder(destination, unfinished)
        cells_of = partial(
            _cells, datasets=datasets, loaded=loaded, config=config, finetuning=finetuning, folder=folder
        )
        cells = _measured(contenders, cells_of, config, jobs, progress)
        results = _results(contenders, datasets, loaded, cells, config)
        (unfinished / layout.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (unfinished / layout.REPORT).write_text(markdown(results), encoding="utf-8")
        gain_chart(results, unfinished / layout.GAIN_CHART)
        manifest.write(
            unfinished,
            {
                "kind": "evaluation",
                "name": contenders[-1].name,
                "identity": key,
                "body_digest": contenders[-1].body_digest,
                "config": {"evaluate": as_record(config), "finetune": as_record(finetuning)},
                "environment": manifest.environment(["torch", "transformers", "scikit-learn", "numpy"]),
            },
        )
    return Evaluated(destination, results, unchanged=False)


def models_of(reference: str, revision: str | None) -> list[Model]:
    """The models that one argument means: a RUN stands for the fused models of all its iterations."""
    path = Path(reference)
    if not (path.is_dir() and run.is_run(path)):
        return [resolve(reference, revision)]
    numbers = layout.iteration_numbers(path)
    found = [layout.fused(path, number) for number in numbers if layout.is_complete(layout.fused(path, number))]
    if not found:
        raise ModelError(f"{path} has no fused model yet: run `coldctl fuse` first, or `make iterate`")
    return [Model(folder.parent.name, str(folder)) for folder in found]


def default_baseline(model: Model) -> Model:
    """The base that a fused model's manifest names, if it can be found: beside it in its RUN, or on the Hub.

    Raises ModelError.
    """
    document = open_checkpoint(model.folder, model.name).manifest
    if document is None or "base" not in document:
        raise ModelError(f"{model.name} has no manifest that names its base: give --baseline")
    wanted = document["base"]
    candidates = []
    enclosing = layout.enclosing_run(Path(model.place))
    if enclosing is not None:
        found = run.read(enclosing)
        candidates = [str(layout.fused(enclosing, item.number)) for item in reversed(found.iterations)] + [
            found.pretrained
        ]
    for candidate in [*candidates, wanted["name"]]:
        try:
            base = resolve(candidate)
        except ModelError:
            continue
        if _digest(base) == wanted["body_digest"]:
            return base
    raise ModelError(f"the base of {model.name}, {wanted['name']!r}, was not found from here: give --baseline")


def _load(dataset: DatasetConfig, config: EvaluateConfig) -> data.Dataset:
    limits = data.Limits(config.max_train_examples, config.max_validation_examples, config.max_test_examples)
    return data.load(dataset, limits, config.seed)


def _digest(model: Model) -> str:
    checkpoint = open_checkpoint(model.folder, model.name)
    return checkpoint.manifest["body_digest"] if checkpoint.manifest else body_digest(checkpoint)


def _files_digest(model: Model) -> str:
    folder = model.folder
    names = [name for name in (layout.MODEL_CONFIG, *layout.TOKENIZER_FILES) if folder.has(name)]
    return manifest.digest_of({name: manifest.digest_of_reader(folder.open(name)) for name in names})


def _contenders(models: Sequence[Model]) -> list[Contender]:
    contenders: list[Contender] = []
    for model in models:
        taken = {item.name for item in contenders}
        name = next(name for name in free_names(model.name) if name not in taken)
        contenders.append(Contender(name, model, _digest(model), _files_digest(model)))
    return contenders


def _cell_folder(destination: Path, partial: Path) -> Path:
    """In a RUN all evaluations share their cells, so that the pretrained model is measured once."""
    enclosing = layout.enclosing_run(destination.parent)
    folder = enclosing / "cells" if enclosing else partial / "cells"
    if enclosing is None and (destination / "cells").is_dir() and not folder.exists():
        folder.mkdir()
        for cell in (destination / "cells").glob("*.json"):
            (folder / cell.name).write_bytes(cell.read_bytes())
    folder.mkdir(exist_ok=True)
    return folder


def _seeds(protocol: str, config: EvaluateConfig) -> list[int]:
    """A linear probe is deterministic: one seed. The others use consecutive ones."""
    return [config.seed] if protocol == "linear-probe" else list(range(config.seed, config.seed + config.seeds))


def _cells(
    contenders: Sequence[Contender],
    protocols: Sequence[str],
    datasets: Sequence[DatasetConfig],
    loaded: dict[str, data.Dataset],
    config: EvaluateConfig,
    finetuning: FinetuneConfig,
    folder: Path,
) -> list[Cell]:
    cells = []
    for contender in contenders:
        for protocol in protocols:
            groups = [tuple(datasets)] if protocol == "multitask" else [(dataset,) for dataset in datasets]
            for group in groups:
                for seed in _seeds(protocol, config):
                    depends = {
                        "schema": CELL_SCHEMA, "model": contender.body_digest, "files": contender.files_digest,
                        "datasets": [[loaded[dataset.name].fingerprint, dataset.metric] for dataset in group],
                        "protocol": protocol, "seed": seed, "settings": _settings(protocol, config, finetuning),
                    }  # fmt: skip
                    path = folder / f"{manifest.digest_of(depends).removeprefix('sha256:')[:32]}.json"
                    cells.append(Cell(str(path), contender, group, protocol, seed, config, finetuning))
    return cells


def _measured(
    contenders: Sequence[Contender],
    cells_of: Callable[..., list[Cell]],
    config: EvaluateConfig,
    jobs: int,
    progress: Progress,
) -> list[Cell]:
    """All cells, measured; with a shortlist only its models go beyond linear probing."""
    if not config.shortlist:
        cells = cells_of(contenders, config.protocol)
        _compute(cells, jobs, progress)
        return cells
    probes = cells_of(contenders, ["linear-probe"])
    _compute(probes, jobs, progress)
    chosen = _shortlisted(contenders, probes, config, progress)
    others = cells_of(chosen, [protocol for protocol in config.protocol if protocol != "linear-probe"])
    _compute(others, jobs, progress)
    return [*probes, *others]


def _shortlisted(
    contenders: Sequence[Contender], cells: Sequence[Cell], config: EvaluateConfig, progress: Progress
) -> list[Contender]:
    """The baseline and the best `config.shortlist` of the others by linear probe, on validation, never on test."""
    scores: dict[str, list[float]] = {}
    for cell in cells:
        document = json.loads(Path(cell.path).read_text(encoding="utf-8"))
        scores.setdefault(cell.contender.name, []).append(float(document["validation"]))
    baseline, *others = contenders
    ranking = sorted(others, key=lambda item: -float(np.mean(scores[item.name])))
    chosen = {item.name for item in ranking[: config.shortlist]}
    words = ", ".join(f"{item.name} {np.mean(scores[item.name]):.1f}" for item in ranking)
    progress.note(f"shortlist: the best {len(chosen)} by linear probe on validation are measured further ({words})")
    return [baseline, *(item for item in others if item.name in chosen)]


def _settings(protocol: str, config: EvaluateConfig, finetuning: FinetuneConfig) -> dict[str, Any]:
    """What a cell's result depends on besides model, dataset and seed."""
    if protocol == "linear-probe":
        return {"pooling": config.pooling, "max_length": config.max_length}
    settings = {key: value for key, value in as_record(finetuning).items() if key not in _CONTRIBUTORS_OWN}
    return settings | ({"shots": config.shots} if protocol == "few-shot" else {})


def _compute(cells: Sequence[Cell], jobs: int, progress: Progress) -> None:
    unique = list({cell.path: cell for cell in cells if not Path(cell.path).exists()}.values())
    if not unique:
        return
    failures = []
    progress.begin("evaluate", len(unique), "cells")
    for outcome in local.run(measure, unique, local.workers(jobs, len(unique)), progress):
        if outcome.error is not None:
            failures.append((unique[outcome.index], outcome.error))
        progress.advance("evaluate", 1)
    progress.end("evaluate")
    if failures:
        kind = type(failures[0][1])
        details = [f"{cell.title}: {error.message}" for cell, error in failures]
        raise kind(f"{len(failures)} of {len(unique)} measurements failed; the others are kept", details)


def measure(cell: Cell, threads: int, progress: Progress) -> str:
    """Compute one cell and write its file: the predictions on the test splits. Returns its path."""
    import torch

    torch.set_num_threads(threads)
    loaded = [_load(dataset, cell.evaluation) for dataset in cell.datasets]
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        folder = cell.contender.model.local(Path(scratch))
        work = _probe if cell.protocol == "linear-probe" else _finetune
        predictions, details = work(cell, loaded, folder, progress)
    document = {
        "schema": CELL_SCHEMA,
        "model": cell.contender.body_digest,
        "datasets": [dataset.fingerprint for dataset in loaded],
        "protocol": cell.protocol,
        "seed": cell.seed,
        "threads": threads,
        **details,
        "predictions": [part.tolist() for part in predictions],
    }
    output.write_text(Path(cell.path), json.dumps(document) + "\n")
    return cell.path


def _probe(
    cell: Cell, loaded: Sequence[data.Dataset], folder: Path, progress: Progress
) -> tuple[list[Any], dict[str, Any]]:
    (dataset,) = loaded
    from coldctl.core import model as models
    from coldctl.core.probe import features, probe

    tokenizer, body = models.load_tokenizer(folder), models.load_body(folder)
    length = models.length_limit(tokenizer, body.config, cell.evaluation.max_length)
    device = models.device_of_choice()
    body.to(device)
    splits = (dataset.train, dataset.validation, dataset.test)
    progress.begin(cell.title, sum(map(len, splits)), "texts")
    train, validation, test = (
        features(body, models.encode(tokenizer, split.texts, split.pairs, length), cell.evaluation.pooling,
                 tokenizer.pad_token_id, device, progress, cell.title)
        for split in splits
    )  # fmt: skip
    progress.end(cell.title)
    metric = data.metric_of(cell.datasets[0], dataset)
    predictions, strength, reached = probe(
        (train, dataset.train.labels),
        (validation, dataset.validation.labels),
        test,
        lambda truth, found: scoring.score(metric, truth, found),
    )
    return [predictions], {"c": strength, "validation": reached}


def _finetune(
    cell: Cell, loaded: Sequence[data.Dataset], folder: Path, progress: Progress
) -> tuple[list[Any], dict[str, Any]]:
    """Finetune on one dataset, on few shots of it, or on all datasets with one body and a head for each."""
    from coldctl.core import model as models
    from coldctl.core.training import Examples, Head, Place, predict, train

    tokenizer = models.load_tokenizer(folder)
    heads, tests = [], []
    for entry, dataset in zip(cell.datasets, loaded, strict=True):
        seed = derived_seed(cell.seed, "evaluate", cell.protocol, entry.name)
        training_split = dataset.train
        if cell.protocol == "few-shot":
            training_split = training_split.take(data.stratified(training_split.labels, cell.evaluation.shots, seed))
        model = models.load_classifier(folder, dataset.labels, seed, multilabel=dataset.multilabel)
        length = models.length_limit(tokenizer, model.config, cell.finetuning.max_length)
        training, validation, test = (
            Examples(models.encode(tokenizer, split.texts, split.pairs, length), split.labels)
            for split in (training_split, dataset.validation, dataset.test)
        )
        measured = partial(scoring.score, data.metric_of(entry, dataset), validation.labels)
        heads.append(Head(model, training, validation, measured))
        tests.append(test)
    models.share_body([head.model for head in heads])
    seed = derived_seed(cell.seed, "evaluate", cell.protocol, *(entry.name for entry in cell.datasets))
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        name = f"{cell.title}, {cell.protocol}, seed {cell.seed}"
        place = Place(
            models.device_of_choice(),
            tokenizer.pad_token_id,
            Path(scratch),
            progress,
            name,
            checkpoint_seconds=math.inf,
        )
        trained = train(heads, replace(cell.finetuning, anchor=0.0, compile=False), place, seed=seed)
    predictions = [predict(head.model, test.encoded, place) for head, test in zip(heads, tests, strict=True)]
    return predictions, {"validation": trained.best_score, "steps": trained.steps, "stopped": trained.stopped}


# Results ------------------------------------------------------------------------------------------------------


def _results(
    contenders: Sequence[Contender],
    datasets: Sequence[DatasetConfig],
    loaded: dict[str, data.Dataset],
    cells: Sequence[Cell],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """`results.json`: one entry per model, dataset and protocol, then the averages over groups of datasets."""
    predictions = {}
    for cell in cells:
        found = json.loads(Path(cell.path).read_text(encoding="utf-8"))["predictions"]
        for dataset, part in zip(cell.datasets, found, strict=True):
            dtype = loaded[dataset.name].test.labels.dtype
            predictions[cell.contender.name, dataset.name, cell.protocol, cell.seed] = np.asarray(part, dtype)
    baseline, *others = contenders
    results, averages = [], []
    for contender in others:
        measured = {cell.protocol for cell in cells if cell.contender == contender}
        for protocol in [name for name in PROTOCOLS if name in measured]:
            certain = protocol == "linear-probe" or config.seeds > 1
            entries, resamples = [], []
            for dataset in datasets:
                seeds = _seeds(protocol, config)
                rows = [
                    np.stack([predictions[item.name, dataset.name, protocol, seed] for seed in seeds])
                    for item in (contender, baseline)
                ]
                source = loaded[dataset.name]
                outcome = scoring.Outcome(data.metric_of(dataset, source), source.test.labels, rows[0], rows[1])
                drawn = scoring.resampled_gains(outcome, derived_seed(config.seed, "bootstrap", dataset.name))
                entries.append(_entry(contender, dataset, protocol, outcome, seeds, drawn, certain=certain))
                resamples.append(drawn)
            results += entries
            averages += _averages(contender, protocol, entries, resamples, certain=certain)
    return {
        "schema": SCHEMA,
        "baseline": {"name": baseline.name, "body_digest": baseline.body_digest},
        "models": [{"name": item.name, "body_digest": item.body_digest} for item in others],
        "fingerprints": {dataset.name: loaded[dataset.name].fingerprint for dataset in datasets},
        "results": results,
        "averages": averages,
    }


def _entry(
    contender: Contender,
    dataset: DatasetConfig,
    protocol: str,
    outcome: scoring.Outcome,
    seeds: Sequence[int],
    drawn: Any,
    *,
    certain: bool,
) -> dict[str, Any]:
    scores = [scoring.score(outcome.metric, outcome.truth, row) for row in outcome.predictions]
    before = [scoring.score(outcome.metric, outcome.truth, row) for row in outcome.baseline]
    mean, baseline_mean = float(np.mean(scores)), float(np.mean(before))
    gain = scoring.judged(mean - baseline_mean, drawn, certain=certain)
    return {
        "model": contender.name,
        "dataset": dataset.name,
        "role": dataset.role,
        "protocol": protocol,
        "metric": outcome.metric,
        "num_test": len(outcome.truth),
        "seeds": [
            {"seed": seed, "score": score, "baseline_score": other}
            for seed, score, other in zip(seeds, scores, before, strict=True)
        ],
        "mean": mean,
        "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "baseline_mean": baseline_mean,
        **_gain_fields(gain),
    }


def _averages(
    contender: Contender, protocol: str, entries: Sequence[dict[str, Any]], resamples: Sequence[Any], *, certain: bool
) -> list[dict[str, Any]]:
    averages = []
    for group in _GROUPS:
        members = [index for index, entry in enumerate(entries) if group in ("all", entry["role"])]
        if not members:
            continue
        gain = scoring.average([entries[i]["gain"] for i in members], [resamples[i] for i in members], certain=certain)
        averages.append(
            {
                "model": contender.name,
                "protocol": protocol,
                "group": group,
                "mean": float(np.mean([entries[i]["mean"] for i in members])),
                "baseline_mean": float(np.mean([entries[i]["baseline_mean"] for i in members])),
                **_gain_fields(gain),
            }
        )
    return averages


def _gain_fields(gain: scoring.Gain) -> dict[str, Any]:
    fields = asdict(gain)
    return {"gain": fields["gain"], "gain_interval": list(fields["interval"]), "verdict": fields["verdict"]}
