"""`coldctl finetune`: make a contribution: body and fresh head, trained on data that stays where it is."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.core import data, layout, manifest, output, run, scoring
from coldctl.core.checkpoint import body_digest, open_checkpoint, outside_body
from coldctl.core.config import DatasetConfig, FinetuneConfig, as_record, check_name, derived_seed, identity
from coldctl.core.errors import ConfigError
from coldctl.core.manifest import Manifest
from coldctl.core.progress import Progress
from coldctl.core.reference import Model
from coldctl.core.storage import LocalFolder
from coldctl.engines import local

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Job:
    """One contribution to be made. Plain values only, so that it can go to another process."""

    dataset: DatasetConfig
    base: Model
    destination: str
    name: str
    config: FinetuneConfig
    iteration: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Finetuned:
    """What one job did, for the summary line and `--json`."""

    name: str
    path: str
    unchanged: bool
    manifest: Manifest
    seconds: float
    train_examples_per_second: float | None
    stopped: str | None


def finetune(job: Job, threads: int, progress: Progress) -> Finetuned:
    """Train one contribution into `job.destination` with `threads` CPU threads.

    Raises DataError, ModelError or OutputError; a complete contribution of the same inputs is left alone.
    """
    started = time.perf_counter()
    destination = Path(job.destination)
    config = job.config
    output.refuse_overlap(destination, [job.base.place, *([] if data.is_hub(job.dataset.path) else [job.dataset.path])])
    limits = data.Limits(
        config.max_train_examples, config.max_validation_examples, config.max_test_examples, config.shots
    )
    dataset = data.load(job.dataset, limits, config.seed)
    source = open_checkpoint(job.base.folder, job.base.name)
    base_digest = source.manifest["body_digest"] if source.manifest else body_digest(source)
    number = job.iteration or (((source.manifest or {}).get("iteration") or 0) + 1)
    key = identity(
        "finetune", config, base=base_digest, dataset=dataset.fingerprint, name=job.name, metric=job.dataset.metric,
        iteration=number, license=job.dataset.license,
    )  # fmt: skip
    if output.is_done(destination, key, overwrite=job.overwrite):
        return Finetuned(job.name, job.destination, True, manifest.read(destination), 0.0, None, None)
    if dataset.leaked:
        progress.note(
            f"{job.name}: {dataset.leaked} of {len(dataset.test)} test examples also stand in train or validation"
        )
    if dataset.regression and job.dataset.metric not in data.REGRESSION_METRICS:
        progress.note(f"{job.name}: the labels are numbers with fractions, so this is a regression, scored by spearman")
    if dataset.unlabelled:
        progress.note(f"{job.name}: {dataset.unlabelled} examples without a label are left out")
    with (
        output.writing(destination, key, overwrite=job.overwrite) as partial,
        tempfile.TemporaryDirectory(prefix="coldctl-") as scratch,
    ):
        trained, metrics = _train(job, dataset, job.base.local(Path(scratch)), partial, number, threads, progress)
        for name in layout.TOKENIZER_FILES:
            if source.folder.has(name):
                (partial / name).write_bytes(source.folder.read(name))
        written = open_checkpoint(LocalFolder(partial), job.name)
        before = source.manifest
        ancestor: dict[str, Any] = (
            manifest.shortened(before)
            if before
            else {"kind": "pretrained", "name": job.base.name, "body_digest": base_digest}
        )
        document: Manifest = {
            "kind": "contribution",
            "name": job.name,
            "iteration": number,
            "encoding": "full",
            "identity": key,
            "body_digest": body_digest(written),
            "outside_body": outside_body(written),
            "base": {"name": ancestor["name"], "body_digest": base_digest},
            "config": as_record(config),
            "environment": manifest.environment(_PACKAGES, device=trained["device"], threads=threads),
            "license": job.dataset.license,
            "dataset": {
                "name": job.dataset.name,
                "fingerprint": dataset.fingerprint,
                "num_train": len(dataset.train),
                "num_validation": len(dataset.validation),
                "labels": list(dataset.labels),
            },
            "metrics": metrics,
        }
        document = manifest.write(partial, document)
    seconds = time.perf_counter() - started
    return Finetuned(job.name, job.destination, False, document, seconds, trained["rate"], trained["stopped"])


def jobs_of_suite(
    datasets: Sequence[DatasetConfig],
    base: Model,
    destination: Path,
    config: FinetuneConfig,
    *,
    sample: int | None,
    only: Sequence[str],
    overwrite: bool,
) -> list[Job]:
    """One job per seen dataset, or per sampled one, or per one named in `only`.

    In a RUN the contributions belong to its next iteration, and whether and how many are sampled is the run's
    own setting unless given. Raises ConfigError.
    """
    seen = [dataset for dataset in datasets if dataset.role == "seen"]
    if not seen:
        raise ConfigError('the suite has no seen dataset: mark those that contribute with role = "seen"')
    if unknown := sorted(set(only) - {dataset.name for dataset in seen}):
        raise ConfigError(f"no seen dataset is called {unknown[0]!r}: the suite has {', '.join(d.name for d in seen)}")
    number, seed = None, config.seed
    folder = destination
    if run.is_run(destination):
        found = run.read(destination)
        number, seed = found.decided + 1, found.seed
        sample = found.sample if sample is None else sample
        folder = layout.contributions(destination, number)
    chosen = seen
    if sample and sample < len(seen):
        order = np.random.default_rng(derived_seed(seed, "contributors", number or 1)).permutation(len(seen))
        chosen = [seen[index] for index in sorted(order[:sample].tolist())]
    if only:
        chosen = [dataset for dataset in seen if dataset.name in only]
    return [
        Job(dataset, base, str(folder / dataset.name), dataset.name, config, number, overwrite) for dataset in chosen
    ]


def single_job(
    dataset: DatasetConfig, base: Model, destination: Path, config: FinetuneConfig, *, name: str | None, overwrite: bool
) -> Job:
    """The job of one contribution; in a RUN it goes where the next iteration looks for it."""
    called = name or dataset.name
    check_name(called, "--name")
    if run.is_run(destination):
        number = run.read(destination).decided + 1
        if layout.is_complete(layout.fused(destination, number)):
            raise ConfigError(
                f"iteration {number} of {destination} is fused and not yet decided: come back when it is promoted"
            )
        return Job(
            dataset, base, str(layout.contributions(destination, number) / called), called, config, number, overwrite
        )
    return Job(dataset, base, str(destination), called, config, None, overwrite)


def finetune_all(
    jobs: Sequence[Job], count: int, progress: Progress, announce: Callable[[Finetuned], None]
) -> list[local.Outcome[Finetuned]]:
    """Run the jobs, `count` side by side, and `announce` each contribution as it is done.

    The outcomes are in the order of the jobs. One failure stops no other.
    """
    outcomes = []
    for outcome in local.run(finetune, jobs, count, progress):
        outcomes.append(outcome)
        if outcome.result is not None:
            announce(outcome.result)
    return sorted(outcomes, key=lambda outcome: outcome.index)


def _train(
    job: Job, dataset: data.Dataset, base: Path, partial: Path, number: int, threads: int, progress: Progress
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Train, save model and metrics. Everything that needs torch is below here."""
    import torch

    from coldctl.core import model as models
    from coldctl.core.training import Examples, predict, train

    torch.set_num_threads(threads)
    config = job.config
    seed = derived_seed(config.seed, "finetune", number, job.name)
    tokenizer = models.load_tokenizer(base)
    model = models.load_classifier(base, dataset.labels, seed)
    length = models.length_limit(tokenizer, model.config, config.max_length)
    train_set, validation, test = (
        Examples(models.encode(tokenizer, split.texts, split.pairs, length), split.labels)
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    metric: str = job.dataset.metric
    if dataset.regression and metric not in data.REGRESSION_METRICS:
        metric = "spearman"
    device = models.device_of_choice()
    trained = train(
        model, train_set, validation, lambda found: scoring.score(metric, np.asarray(validation.labels), found), config,
        seed=seed, padding=tokenizer.pad_token_id, device=device, progress=progress, task=job.name,
    )  # fmt: skip
    reached = scoring.score(
        metric, np.asarray(test.labels), predict(model, test.encoded, tokenizer.pad_token_id, device)
    )
    model.cpu().save_pretrained(partial)  # type: ignore[operator]
    metrics = {"validation": {metric: trained.best_score}, "test": {metric: reached}}
    return {
        "device": device.type,
        "rate": trained.examples / trained.seconds if trained.seconds else None,
        "stopped": trained.stopped,
    }, metrics
