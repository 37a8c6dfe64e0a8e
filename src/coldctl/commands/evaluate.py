"""`coldctl evaluate`: measure models against a baseline, per dataset and on average.

Resolve the models, plan the cells (model, dataset, protocol, seed), measure those that are missing, judge the gains, write
the report. Gains are paired: the same splits and seeds for model and baseline.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from coldctl.artifacts import layout, manifest, output
from coldctl.artifacts.manifest import Manifest
from coldctl.artifacts.model_ref import resolve
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import open_checkpoint
from coldctl.common.errors import ConfigError
from coldctl.common.progress import Progress
from coldctl.config.loading import as_record, identity
from coldctl.data.datasets import Dataset
from coldctl.data.sources import is_hub
from coldctl.evaluation import results as results_file
from coldctl.evaluation.charts import curve_chart, gain_chart
from coldctl.evaluation.curves import panels_of
from coldctl.evaluation.gains import judge_gains
from coldctl.evaluation.markdown import overlap_sentences, report
from coldctl.evaluation.measure import Cell, Suite, measure_cells, measurement_of, plan_cells
from coldctl.evaluation.models import ModelUnderTest, default_baseline, models_under_test, with_unique_names
from coldctl.evaluation.page import page
from coldctl.evaluation.results import OverlapEntry, Results
from coldctl.fusing.passes import verify_checkpoint
from coldctl.storage.location import Location, locate
from coldctl.workers.jobs import Engine


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, as `results.json` holds it, and whether it was complete already."""

    path: Location
    results: Results
    unchanged: bool


def evaluate(
    references: Sequence[str],
    baseline: str | None,
    suite: Suite,
    destination: Location,
    *,
    revision: str | None,
    engine: Engine,
    overwrite: bool,
    progress: Progress,
) -> Evaluated:
    """Measure models against a baseline on a suite and write `results.json`, reports and charts.

    `references` name the models: a RUN stands for the fused models of all its iterations. Without a `baseline` it is the
    base that the first model's manifest names. `revision` is that of models on the Hub. Raises ConfigError, DataError,
    ModelError or OutputError. If measurements fail, those that succeeded are kept, and the first failure is raised with
    all of them listed.
    """
    models = models_under_test(references, revision)
    base = resolve(baseline, revision) if baseline else default_baseline(models[0].model)
    if "few-shot" in suite.config.protocol and not suite.config.shots:
        raise ConfigError("shots = 0 leaves few-shot nothing to train on: give --shots 1 or more")
    places = [base.place, *(model.model.place for model in models)]
    output.refuse_overlap(destination, [*places, *(data.path for data in suite.datasets if not is_hub(data.path))])
    loaded = suite.load()
    models = with_unique_names([ModelUnderTest(base.name, base), *models])
    document = _manifest(models, suite, loaded)
    if output.is_done(destination, document["identity"], overwrite=overwrite):
        manifest.read_unchanged(destination)
        return Evaluated(destination, results_file.read(destination), unchanged=True)
    for model in models:  # cells and features are named by the digests that manifests state
        verify_checkpoint(open_checkpoint(model.model.folder, model.name))
    overlaps = _overlaps(loaded)
    _announce(models, loaded, overlaps, progress)
    with output.atomic_output(destination, document["identity"], overwrite=overwrite) as unfinished:
        plan = partial(plan_cells, suite=suite, loaded=loaded, folder=_cell_folder(destination, unfinished))
        measure = partial(
            measure_cells, reusable=_reusable_cells(destination, models), engine=engine, progress=progress
        )
        if suite.config.shortlist:
            cells = plan(models, ["linear-probe"])
            measure(cells)
            chosen = _shortlist(models, cells, suite.config.shortlist, progress)
            further = plan(chosen, [name for name in suite.config.protocol if name != "linear-probe"])
            measure(further)
            cells += further
        else:
            cells = plan(models, suite.config.protocol)
            measure(cells)
        results = judge_gains(models, suite, loaded, cells, overlaps)
        _write(unfinished, results, document, _earlier_results(destination, results, document), models[-1])
    return Evaluated(destination, results, unchanged=False)


def _manifest(models: Sequence[ModelUnderTest], suite: Suite, loaded: Mapping[str, Dataset]) -> Manifest:
    finetuning = as_record(suite.finetuning)
    key = identity(
        "evaluate",
        suite.config,
        finetuning=finetuning,
        models=[[model.name, model.body_digest, model.files_digest] for model in models],
        datasets=[[data.name, data.role, data.metric, loaded[data.name].fingerprint] for data in suite.datasets],
    )
    return {
        "kind": "evaluation",
        "name": models[-1].name,
        "identity": key,
        "body_digest": models[-1].body_digest,
        "config": {"evaluate": as_record(suite.config), "finetune": finetuning},
        "environment": manifest.environment(["torch", "transformers", "scikit-learn", "numpy"]),
    }


def _overlaps(loaded: Mapping[str, Dataset]) -> list[OverlapEntry]:
    """Count the test examples, as limited, that are also in the whole training split of a dataset of the suite."""
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


def _announce(
    models: Sequence[ModelUnderTest],
    loaded: Mapping[str, Dataset],
    overlaps: Sequence[OverlapEntry],
    progress: Progress,
) -> None:
    """Tell what a reader of the results should know about models and data."""
    for model in models:
        if words := sanitize.note_on(model.model.folder):
            progress.note(f"{model.name} {words}")
    for name, dataset in loaded.items():
        for sentence in dataset.overlaps():
            progress.note(f"{name}: {sentence}")
    for sentence in overlap_sentences([entry for entry in overlaps if entry["test_of"] != entry["train_of"]]):
        progress.note(sentence)


def _cell_folder(destination: Location, unfinished: Location) -> Location:
    """Return the folder for cells: in a RUN all evaluations share one, so the pretrained model is measured once."""
    folder = (layout.enclosing_run(destination.parent) or unfinished) / layout.CELLS
    folder.mkdir(exist_ok=True)
    return folder


def _reusable_cells(destination: Location, models: Sequence[ModelUnderTest]) -> list[Location]:
    """Return folders that may hold cells already: of the output that is replaced, and of the runs of the models."""
    runs = (layout.enclosing_run(locate(model.model.place)) for model in models)
    places = [destination, *(run for run in runs if run is not None)]
    return [place / layout.CELLS for place in dict.fromkeys(places) if (place / layout.CELLS).is_dir()]


def _shortlist(
    models: Sequence[ModelUnderTest], probes: Sequence[Cell], count: int, progress: Progress
) -> list[ModelUnderTest]:
    """Return the baseline and the best `count` of the others by linear probe, on validation, never on test."""
    scores: dict[str, list[float]] = {}
    for cell in probes:
        scores.setdefault(cell.model.name, []).append(float(measurement_of(cell)["validation"]))
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    baseline, *others = models
    ranking = sorted(others, key=lambda model: -means[model.name])
    words = ", ".join(f"{model.name} {means[model.name]:.1f}" for model in ranking)
    chosen = ranking[:count]
    progress.note(f"shortlist: the best {len(chosen)} by linear probe on validation are measured further ({words})")
    return [baseline, *(model for model in others if model in chosen)]


def _earlier_results(destination: Location, results: Results, document: Manifest) -> list[Results]:
    """Return the results of earlier iterations of the same RUN that were measured in the same way."""
    enclosing = layout.enclosing_run(destination.parent)
    if enclosing is None:
        return []
    newest = max((model["iteration"] or 0 for model in results["models"]), default=0)
    comparable = []
    for number in layout.iteration_numbers(enclosing):
        folder = layout.evaluation(enclosing, number)
        if number >= newest or folder == destination.resolve() or not layout.is_complete(folder):
            continue
        config = manifest.read_unchanged(folder)["config"]
        earlier = results_file.read(folder)
        if _measured_on(earlier) == _measured_on(results) and config == document["config"]:
            comparable.append(earlier)
    return comparable


def _measured_on(results: Results) -> tuple[Any, ...]:
    suite = {(entry["dataset"], entry["role"], entry["metric"]) for entry in results["results"]}
    return results["baseline"], results["fingerprints"], suite


def _write(
    folder: Location, results: Results, document: Manifest, earlier: Sequence[Results], last: ModelUnderTest
) -> None:
    """Write the results, the reports, the charts, and last the manifest."""
    panels = panels_of(results, earlier)
    origin = open_checkpoint(last.model.folder, last.name).manifest
    (folder / layout.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / layout.REPORT).write_text(report(results, panels), encoding="utf-8")
    (folder / layout.PAGE).write_text(page(results, panels, document, origin), encoding="utf-8")
    gain_chart(results, folder / layout.GAIN_CHART)
    if panels:
        curve_chart(panels, folder / layout.CURVE_CHART)
    manifest.write(folder, document)
