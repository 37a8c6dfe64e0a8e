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
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from coldctl.artifacts import layout, manifest, output, run
from coldctl.artifacts.model_ref import Model, memory_needed, resolve
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import open_checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.common.digests import derived_seed, digest_of
from coldctl.common.errors import ConfigError, DataError, ModelError, OutputError
from coldctl.common.progress import Progress
from coldctl.config.loading import as_record, identity
from coldctl.config.settings import PROTOCOLS, DatasetConfig, EvaluateConfig, FinetuneConfig
from coldctl.data.datasets import Dataset, Limits, load_dataset, metric_of
from coldctl.data.sampling import stratified
from coldctl.data.sources import is_hub
from coldctl.evaluation import cache, curves, scoring
from coldctl.evaluation import cells as cell_files
from coldctl.evaluation import results as results_file
from coldctl.evaluation.charts import curve_chart, gain_chart
from coldctl.evaluation.markdown import markdown, overlap_sentences
from coldctl.evaluation.page import page
from coldctl.evaluation.results import OverlapEntry, Results
from coldctl.fusing.contributions import free_names
from coldctl.fusing.passes import prove
from coldctl.storage.location import Location, locate
from coldctl.workers.jobs import Engine, Needs

CELL_SCHEMA = 4
# Settings of [finetune] that say how a contribution is made; a measurement trains everything, freely.
_CONTRIBUTORS_OWN = (
    "anchor", "compile", "fisher", "freeze_embeddings", "freeze_layers", "lora_rank", "send", "body_only", "shots",
    "shots_per_class", "max_train_examples", "max_validation_examples", "max_test_examples", "seed",
)  # fmt: skip
_GROUPS = ("all", "seen", "unseen")


@dataclass(frozen=True)
class Candidate:
    """A model to be measured, and which iteration of which run made it, if one did."""

    model: Model
    run: str | None = None
    iteration: int | None = None


@dataclass(frozen=True)
class Contender:
    """A model under test, with the digest of its body."""

    name: str
    model: Model
    body_digest: str
    files_digest: str  # of config and tokenizer, which decide what the same weights compute
    run: str | None = None
    iteration: int | None = None


@dataclass(frozen=True)
class Cell:
    """One measurement to be made: plain values only, so that it can go to another process.

    It is about one dataset; multitask training is one measurement of all of them.
    """

    path: str
    contender: Contender
    datasets: tuple[DatasetConfig, ...]
    fingerprints: tuple[str, ...]
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

    path: Location
    results: Results
    unchanged: bool


def evaluate(
    models: Sequence[Candidate],
    baseline: Model,
    datasets: Sequence[DatasetConfig],
    destination: Location,
    config: EvaluateConfig,
    finetuning: FinetuneConfig,
    *,
    engine: Engine,
    overwrite: bool,
    progress: Progress,
) -> Evaluated:
    """Measure `models` against `baseline` on the suite and write `results.json`, reports and charts.

    Raises ConfigError, DataError, ModelError or OutputError. If cells fail, those that succeeded are kept, and
    the first failure is raised with all of them listed.
    """
    if "few-shot" in config.protocol and not config.shots:
        raise ConfigError("shots = 0 leaves few-shot nothing to train on: give --shots 1 or more")
    places = [model.place for model in (baseline, *(item.model for item in models))]
    output.refuse_overlap(destination, [*places, *(item.path for item in datasets if not is_hub(item.path))])
    loaded = {dataset.name: _load(dataset, config) for dataset in datasets}
    contenders = _contenders([Candidate(baseline), *models])
    measured = [[item.name, item.body_digest, item.files_digest] for item in contenders]
    key = identity(
        "evaluate", config, finetuning=as_record(finetuning), models=measured,
        datasets=[[item.name, item.role, item.metric, loaded[item.name].fingerprint] for item in datasets],
    )  # fmt: skip
    if output.is_done(destination, key, overwrite=overwrite):
        manifest.read_unchanged(destination)
        return Evaluated(destination, results_file.read(destination), unchanged=True)
    _prove(contenders)
    for item in contenders:
        if words := sanitize.note_on(item.model.folder):
            progress.note(f"{item.name} {words}")
    overlaps = _overlaps(loaded)
    for dataset in datasets:
        for sentence in loaded[dataset.name].overlaps():
            progress.note(f"{dataset.name}: {sentence}")
    for sentence in overlap_sentences({"overlaps": [item for item in overlaps if item["test_of"] != item["train_of"]]}):
        progress.note(sentence)
    with output.atomic_output(destination, key, overwrite=overwrite) as unfinished:
        folder = _cell_folder(destination, unfinished)
        cells_of = partial(
            _cells, datasets=datasets, loaded=loaded, config=config, finetuning=finetuning, folder=folder
        )
        compute = partial(_compute, known=_known_cells(destination, contenders), engine=engine, progress=progress)
        cells = _measured(contenders, cells_of, compute, config, progress)
        results = _results(contenders, datasets, loaded, cells, config, overlaps)
        (unfinished / layout.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        document: manifest.Manifest = {
            "kind": "evaluation",
            "name": contenders[-1].name,
            "identity": key,
            "body_digest": contenders[-1].body_digest,
            "config": {"evaluate": as_record(config), "finetune": as_record(finetuning)},
            "environment": manifest.environment(["torch", "transformers", "scikit-learn", "numpy"]),
        }
        panels = curves.panels(results, _earlier(destination, results, document))
        origin = open_checkpoint(contenders[-1].model.folder, contenders[-1].name).manifest
        (unfinished / layout.REPORT).write_text(markdown(results, panels), encoding="utf-8")
        (unfinished / layout.PAGE).write_text(page(results, panels, document, origin), encoding="utf-8")
        gain_chart(results, unfinished / layout.GAIN_CHART)
        if panels:
            curve_chart(panels, unfinished / layout.CURVE_CHART)
        manifest.write(unfinished, document)
    return Evaluated(destination, results, unchanged=False)


def candidates_of(references: Sequence[str], revision: str | None) -> list[Candidate]:
    """The models that arguments mean: a RUN stands for the fused models of all its iterations.

    They are called `iteration-NNN`, and with several RUNs `RUN/iteration-NNN`. Raises ModelError.
    """
    folders = [locate(reference) for reference in references]
    runs = {folder for folder in folders if run.is_run(folder)}
    names: dict[Location, str] = {}
    found = []
    for reference, folder in zip(references, folders, strict=True):
        if folder not in runs:
            found.append(_candidate(resolve(reference, revision), names))
            continue
        numbers = [n for n in layout.iteration_numbers(folder) if layout.is_complete(layout.fused(folder, n))]
        if not numbers:
            raise ModelError(f"{folder} has no fused model yet: run `coldctl fuse` first, or `make iterate`")
        own = _run_name(folder, names)
        for number in numbers:
            place = layout.fused(folder, number)
            name = place.parent.name if len(runs) == 1 else f"{own}/{place.parent.name}"
            found.append(Candidate(Model(name, str(place)), own, number))
    return found


def _candidate(model: Model, names: dict[Location, str]) -> Candidate:
    """A single model; one that lies in a RUN is known by its iteration."""
    path = locate(model.place)
    enclosing = layout.enclosing_run(path)
    if enclosing is not None:
        for number in layout.iteration_numbers(enclosing):
            if path.resolve() == layout.fused(enclosing, number):
                return Candidate(model, _run_name(enclosing, names), number)
    return Candidate(model)


def _run_name(folder: Location, names: dict[Location, str]) -> str:
    """What a RUN is called: its directory's name, unless another of the RUNs in `names` is called so."""
    place = folder.resolve()
    if place not in names:
        names[place] = next(name for name in free_names(place.name) if name not in names.values())
    return names[place]


def default_baseline(model: Model) -> Model:
    """The base that a fused model's manifest names, if it can be found: beside it in its RUN, or on the Hub.

    Raises ModelError.
    """
    document = open_checkpoint(model.folder, model.name).manifest
    if document is None or "base" not in document:
        raise ModelError(f"{model.name} has no manifest that names its base: give --baseline")
    wanted = document["base"]
    candidates = []
    enclosing = layout.enclosing_run(locate(model.place))
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


def _load(dataset: DatasetConfig, config: EvaluateConfig) -> Dataset:
    limits = Limits(config.max_train_examples, config.max_validation_examples, config.max_test_examples)
    return load_dataset(dataset, limits, config.seed)


def _digest(model: Model) -> str:
    checkpoint = open_checkpoint(model.folder, model.name)
    return checkpoint.manifest["body_digest"] if checkpoint.manifest else body_digest(checkpoint)


def _prove(contenders: Sequence[Contender]) -> None:
    """Refuse a model that is not what its manifest states, since cells and features go by that. Raises CheckpointError."""
    for item in contenders:
        prove(open_checkpoint(item.model.folder, item.name))


def _files_digest(model: Model) -> str:
    folder = model.folder
    names = [name for name in (layout.MODEL_CONFIG, *layout.TOKENIZER_FILES) if folder.has(name)]
    return digest_of({name: manifest.digest_of_reader(folder.open(name)) for name in names})


def _contenders(candidates: Sequence[Candidate]) -> list[Contender]:
    contenders: list[Contender] = []
    for item in candidates:
        taken = {other.name for other in contenders}
        name = next(name for name in free_names(item.model.name) if name not in taken)
        digests = _digest(item.model), _files_digest(item.model)
        contenders.append(Contender(name, item.model, *digests, item.run, item.iteration))
    return contenders


def _overlaps(loaded: dict[str, Dataset]) -> list[OverlapEntry]:
    """Test examples, as limited, that also stand in the whole training split of a dataset of the suite."""
    counts = (
        (test, train, loaded[test].tested_in(loaded[train]), len(loaded[test].test))
        for test in loaded
        for train in loaded
    )
    return [
        {"test_of": test, "train_of": train, "examples": count, "num_test": total}
        for test, train, count, total in counts
        if count
    ]


def _earlier(destination: Location, results: Results, document: manifest.Manifest) -> list[Results]:
    """What the RUN that `destination` belongs to found in its other iterations, where it can be compared."""
    enclosing = layout.enclosing_run(destination.parent)
    if enclosing is None:
        return []
    newest = max((model["iteration"] or 0 for model in results["models"]), default=0)
    found = []
    for number in layout.iteration_numbers(enclosing):
        folder = layout.evaluation(enclosing, number)
        if number >= newest or folder == destination.resolve() or not layout.is_complete(folder):
            continue
        config = manifest.read_unchanged(folder)["config"]
        other = results_file.read(folder)
        if _measured_as(other) == _measured_as(results) and config == document["config"]:
            found.append(other)
    return found


def _measured_as(results: Results) -> tuple[Any, ...]:
    """What two evaluations must share, beside their settings, for their averages to be held against each other."""
    suite = {(entry["dataset"], entry["role"], entry["metric"]) for entry in results["results"]}
    return results["baseline"], results["fingerprints"], suite


def _cell_folder(destination: Location, partial: Location) -> Location:
    """In a RUN all evaluations share their cells, so that the pretrained model is measured once."""
    enclosing = layout.enclosing_run(destination.parent)
    folder = enclosing / layout.CELLS if enclosing else partial / layout.CELLS
    folder.mkdir(exist_ok=True)
    return folder


def _known_cells(destination: Location, contenders: Sequence[Contender]) -> list[Location]:
    """Where measurements may lie already: the output that is replaced, and the runs that models come from."""
    runs = (layout.enclosing_run(locate(item.model.place)) for item in contenders)
    places = [destination, *(found for found in runs if found is not None)]
    return [place / layout.CELLS for place in dict.fromkeys(places) if (place / layout.CELLS).is_dir()]


def _seeds(protocol: str, config: EvaluateConfig) -> list[int]:
    """A linear probe is deterministic: one seed. The others use consecutive ones."""
    return [config.seed] if protocol == "linear-probe" else list(range(config.seed, config.seed + config.seeds))


def _cells(
    contenders: Sequence[Contender],
    protocols: Sequence[str],
    datasets: Sequence[DatasetConfig],
    loaded: dict[str, Dataset],
    config: EvaluateConfig,
    finetuning: FinetuneConfig,
    folder: Location,
) -> list[Cell]:
    cells = []
    newest = {item.run: item for item in sorted(contenders, key=lambda item: item.iteration or 0)}
    several = {item.run for item in contenders if item.run is not None and item != newest[item.run]}
    for contender in contenders:
        for protocol in protocols:
            if protocol == "multitask" and contender.run in several and contender != newest[contender.run]:
                continue  # a line to hold the curves against, not a curve
            groups = [tuple(datasets)] if protocol == "multitask" else [(dataset,) for dataset in datasets]
            for group in groups:
                prints = tuple(loaded[dataset.name].fingerprint for dataset in group)
                for seed in _seeds(protocol, config):
                    depends = {
                        "schema": CELL_SCHEMA, "model": contender.body_digest, "files": contender.files_digest,
                        "datasets": [list(item) for item in zip(prints, (dataset.metric for dataset in group), strict=True)],
                        "protocol": protocol, "seed": seed, "settings": _settings(protocol, config, finetuning),
                    }  # fmt: skip
                    if protocol != "linear-probe":
                        depends["names"] = [dataset.name for dataset in group]  # a training's seed goes by them
                    path = folder / f"{digest_of(depends).removeprefix('sha256:')[:32]}.json"
                    cells.append(Cell(str(path), contender, group, prints, protocol, seed, config, finetuning))
    return cells


def _measured(
    contenders: Sequence[Contender],
    cells_of: Callable[..., list[Cell]],
    compute: Callable[[Sequence[Cell]], None],
    config: EvaluateConfig,
    progress: Progress,
) -> list[Cell]:
    """All cells, measured; with a shortlist only its models go beyond linear probing."""
    if not config.shortlist:
        cells = cells_of(contenders, config.protocol)
        compute(cells)
        return cells
    probes = cells_of(contenders, ["linear-probe"])
    compute(probes)
    chosen = _shortlisted(contenders, probes, config, progress)
    others = cells_of(chosen, [protocol for protocol in config.protocol if protocol != "linear-probe"])
    compute(others)
    return [*probes, *others]


def _shortlisted(
    contenders: Sequence[Contender], cells: Sequence[Cell], config: EvaluateConfig, progress: Progress
) -> list[Contender]:
    """The baseline and the best `config.shortlist` of the others by linear probe, on validation, never on test."""
    scores: dict[str, list[float]] = {}
    for cell in cells:
        document = _measurement(cell)
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


def _compute(cells: Sequence[Cell], known: Sequence[Location], engine: Engine, progress: Progress) -> None:
    for cell in cells:
        path = locate(cell.path)
        for folder in known:
            if (
                folder != path.parent
                and cell_files.read(path) is None
                and (found := cell_files.read(folder / path.name))
            ):
                cell_files.write(path, found)
    unique = list({cell.path: cell for cell in cells if cell_files.read(locate(cell.path)) is None}.values())
    if not unique:
        return
    failures = []
    progress.begin("evaluate", len(unique), "cells")
    training = any(cell.protocol != "linear-probe" for cell in unique)
    needs = Needs(max(memory_needed(cell.contender.model, training=training) for cell in unique), gpu=True)
    for outcome in engine.run(measure, unique, progress, needs):
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
    for dataset, fingerprint in zip(loaded, cell.fingerprints, strict=True):
        if dataset.fingerprint != fingerprint:  # a split that vanished, say: another would be taken in its place
            raise DataError(f"{dataset.name} was changed while it was used: restore it and run the same command again")
    work = _probe if cell.protocol == "linear-probe" else _finetune
    predictions, details = work(cell, loaded, progress)
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
    cell_files.write(locate(cell.path), document)
    return cell.path


def _measurement(cell: Cell) -> dict[str, Any]:
    """What `measure` has found. Raises OutputError if it is gone again."""
    found = cell_files.read(locate(cell.path))
    if found is None:
        raise OutputError(f"{cell.path} was changed or removed while it was used: run the same command again")
    return found


def _probe(cell: Cell, loaded: Sequence[Dataset], progress: Progress) -> tuple[list[Any], dict[str, Any]]:
    (dataset,) = loaded
    from coldctl.evaluation.probe import probe

    key = {
        "model": cell.contender.body_digest, "files": cell.contender.files_digest, "dataset": dataset.fingerprint,
        "pooling": cell.evaluation.pooling, "max_length": cell.evaluation.max_length,
        "versions": manifest.environment(["torch", "transformers", "tokenizers"]),
    }  # fmt: skip
    train, validation, test = cache.cached(key, lambda: _features(cell, dataset, progress), progress.note)
    metric = metric_of(cell.datasets[0], dataset)
    predictions, strength, reached = probe(
        (train, dataset.train.labels),
        (validation, dataset.validation.labels),
        test,
        lambda truth, found: scoring.score(metric, truth, found),
    )
    return [predictions], {"c": strength, "validation": reached}


def _features(cell: Cell, dataset: Dataset, progress: Progress) -> list[Any]:
    """What the cell's model makes of train, validation and test: float32 [examples, hidden size] each."""
    from coldctl.evaluation.probe import features
    from coldctl.training import model as models

    folder = cell.contender.model.local()
    tokenizer, body = models.load_tokenizer(folder), models.load_body(folder)
    length = models.length_limit(tokenizer, body.config, cell.evaluation.max_length)
    device = models.device_of_choice()
    body.to(device)
    splits = (dataset.train, dataset.validation, dataset.test)
    progress.begin(cell.title, sum(map(len, splits)), "texts")
    found = [
        features(body, models.encode(tokenizer, split.texts, split.pairs, length), cell.evaluation.pooling,
                 tokenizer.pad_token_id, device, progress, cell.title)
        for split in splits
    ]  # fmt: skip
    progress.end(cell.title)
    return found


def _finetune(cell: Cell, loaded: Sequence[Dataset], progress: Progress) -> tuple[list[Any], dict[str, Any]]:
    """Finetune on one dataset, on few shots of it, or on all datasets with one body and a head for each."""
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        return _trained(cell, loaded, cell.contender.model.local(), Path(scratch), progress)


def _trained(
    cell: Cell, loaded: Sequence[Dataset], folder: Path, scratch: Path, progress: Progress
) -> tuple[list[Any], dict[str, Any]]:
    from coldctl.training import model as models
    from coldctl.training.batches import Examples
    from coldctl.training.loop import Task, TrainingContext, predict, train

    tokenizer = models.load_tokenizer(folder)
    tasks, tests = [], []
    for entry, dataset in zip(cell.datasets, loaded, strict=True):
        seed = derived_seed(cell.seed, "evaluate", cell.protocol, entry.name)
        training_split = dataset.train
        if cell.protocol == "few-shot":
            training_split = training_split.take(stratified(training_split.labels, cell.evaluation.shots, seed))
        model = models.load_classifier(folder, dataset.labels, seed, multilabel=dataset.multilabel)
        length = models.length_limit(tokenizer, model.config, cell.finetuning.max_length)
        training, validation, test = (
            Examples(models.encode(tokenizer, split.texts, split.pairs, length), split.labels)
            for split in (training_split, dataset.validation, dataset.test)
        )
        measured = partial(scoring.score, metric_of(entry, dataset), validation.labels)
        tasks.append(Task(model, training, validation, measured))
        tests.append(test)
    models.share_body([task.model for task in tasks])
    seed = derived_seed(cell.seed, "evaluate", cell.protocol, *(entry.name for entry in cell.datasets))
    name = f"{cell.title}, {cell.protocol}, seed {cell.seed}"
    context = TrainingContext(
        models.device_of_choice(), tokenizer.pad_token_id, scratch / layout.TRAINING, progress, name,
        checkpoint_seconds=math.inf,
    )  # fmt: skip
    trained = train(tasks, replace(cell.finetuning, anchor=0.0, compile=False), context, seed=seed)
    predictions = [predict(task.model, test.encoded, context) for task, test in zip(tasks, tests, strict=True)]
    return predictions, {"validation": trained.best_score, "steps": trained.steps, "stopped": trained.stopped}


# Results ------------------------------------------------------------------------------------------------------


def _results(
    contenders: Sequence[Contender],
    datasets: Sequence[DatasetConfig],
    loaded: dict[str, Dataset],
    cells: Sequence[Cell],
    config: EvaluateConfig,
    overlaps: list[OverlapEntry],
) -> Results:
    """`results.json`: one entry per model, dataset and protocol, then the averages over groups of datasets."""
    predictions = {}
    files = {}
    for cell in cells:
        files.update(
            {
                (cell.contender.name, item.name, cell.protocol, cell.seed): PurePath(cell.path).stem
                for item in cell.datasets
            }
        )
        found = _measurement(cell)["predictions"]
        for dataset, part in zip(cell.datasets, found, strict=True):
            dtype = loaded[dataset.name].test.labels.dtype
            predictions[cell.contender.name, dataset.name, cell.protocol, cell.seed] = np.asarray(part, dtype)
    baseline, *others = contenders
    results: list[Any] = []
    averages: list[Any] = []
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
                outcome = scoring.Outcome(metric_of(dataset, source), source.test.labels, rows[0], rows[1])
                drawn = scoring.resampled_gains(
                    outcome,
                    derived_seed(config.seed, "bootstrap", dataset.name),
                    derived_seed(config.seed, "bootstrap", protocol) if protocol == "multitask" else None,
                )
                entry = _entry(contender, dataset, protocol, outcome, seeds, drawn, certain=certain)
                for item in entry["seeds"]:
                    for owner, field in ((contender, "cell"), (baseline, "baseline_cell")):
                        item[field] = files[owner.name, dataset.name, protocol, item["seed"]]
                entries.append(entry)
                resamples.append(drawn)
            results += entries
            averages += _averages(contender, protocol, entries, resamples, certain=certain)
    return {
        "schema": 1,
        "baseline": {"name": baseline.name, "body_digest": baseline.body_digest},
        "models": [
            {"name": item.name, "body_digest": item.body_digest, "run": item.run, "iteration": item.iteration}
            for item in others
        ],
        "fingerprints": {dataset.name: loaded[dataset.name].fingerprint for dataset in datasets},
        "results": results,
        "averages": averages,
        "overlaps": overlaps,
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
