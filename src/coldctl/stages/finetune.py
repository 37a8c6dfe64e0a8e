"""`coldctl finetune`: make a contribution: body and fresh head, trained on data that stays where it is."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.core import data, layout, manifest, output, run, scoring, team
from coldctl.core.checkpoint import Checkpoint, body_digest, open_checkpoint, outside_body
from coldctl.core.config import (
    DatasetConfig,
    FinetuneConfig,
    as_record,
    check_finetuning,
    check_name,
    derived_seed,
    identity,
)
from coldctl.core.encodings import open_adapter
from coldctl.core.errors import ConfigError
from coldctl.core.manifest import Manifest
from coldctl.core.progress import Progress
from coldctl.core.reference import Model
from coldctl.core.report import training_chart
from coldctl.core.storage import LocalFolder
from coldctl.core.training_log import open_log
from coldctl.engines import local

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Watching:
    """How a training is followed and kept safe; nothing of it changes the contribution."""

    log: str | None = None
    folder: str = "coldctl-logs"
    checkpoint_seconds: float = 60.0


_UNWATCHED = Watching()


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
    watching: Watching = _UNWATCHED


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

    Raises DataError, ModelError or OutputError; a complete contribution of the same inputs is left alone, and
    unfinished training goes on from its last checkpoint.
    """
    started = time.perf_counter()
    peers = team.find()
    destination = Path(job.destination)
    config = job.config
    output.refuse_overlap(destination, [job.base.place, *([] if data.is_hub(job.dataset.path) else [job.dataset.path])])
    dataset = data.load(job.dataset, _limits(config), config.seed)
    source = open_checkpoint(job.base.folder, job.base.name)
    base_digest = source.manifest["body_digest"] if source.manifest else body_digest(source)
    number = job.iteration or (((source.manifest or {}).get("iteration") or 0) + 1)
    key = identity(
        "finetune", config, base=base_digest, dataset=dataset.fingerprint, name=job.name, metric=job.dataset.metric,
        iteration=number, license=job.dataset.license,
    )  # fmt: skip
    if peers.agreed(peers.leads and output.is_done(destination, key, overwrite=job.overwrite)):
        return Finetuned(job.name, job.destination, True, manifest.read(destination), 0.0, None, None)
    if not peers.leads:  # it computes its share and writes nothing
        with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
            trained = _train(job, dataset, Path(scratch), number, threads, progress, peers)
        return Finetuned(job.name, job.destination, False, {}, 0.0, None, trained.stopped)
    _tell(job, dataset, progress)
    with output.writing(destination, key, overwrite=job.overwrite) as partial:
        trained = _train(job, dataset, partial, number, threads, progress, peers)
        for name in layout.TOKENIZER_FILES:
            if source.folder.has(name):
                (partial / name).write_bytes(source.folder.read(name))
        document = manifest.write(
            partial, _manifest(job, dataset, source, base_digest, partial, number, key, trained, threads)
        )
        shutil.rmtree(partial / layout.TRAINING)
    seconds = time.perf_counter() - started
    return Finetuned(job.name, job.destination, False, document, seconds, trained.rate, trained.stopped)


def jobs_of_suite(
    datasets: Sequence[DatasetConfig],
    base: Model,
    destination: Path,
    config: FinetuneConfig,
    *,
    sample: int | None,
    only: Sequence[str],
    overwrite: bool,
    watching: Watching = _UNWATCHED,
) -> list[Job]:
    """One job per seen dataset, or per sampled one, or per one named in `only`.

    In a RUN the contributions belong to its next iteration, and whether and how many are sampled is the run's
    own setting unless given. Raises ConfigError.
    """
    check_finetuning(config)
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
        Job(dataset, base, str(folder / dataset.name), dataset.name, config, number, overwrite, watching)
        for dataset in chosen
    ]


def single_job(
    dataset: DatasetConfig,
    base: Model,
    destination: Path,
    config: FinetuneConfig,
    *,
    name: str | None,
    overwrite: bool,
    watching: Watching = _UNWATCHED,
) -> Job:
    """The job of one contribution; in a RUN it goes where the next iteration looks for it."""
    check_finetuning(config)
    called = name or dataset.name
    check_name(called, "--name")
    if run.is_run(destination):
        number = run.read(destination).decided + 1
        if layout.is_complete(layout.fused(destination, number)):
            raise ConfigError(
                f"iteration {number} of {destination} is fused and not yet decided: come back when it is promoted"
            )
        folder = layout.contributions(destination, number)
        return Job(dataset, base, str(folder / called), called, config, number, overwrite, watching)
    return Job(dataset, base, str(destination), called, config, None, overwrite, watching)


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


@dataclass(frozen=True)
class _Learned:
    """What `_train` leaves to be written down."""

    device: str
    metrics: dict[str, dict[str, float]]
    rate: float | None
    stopped: str


def _limits(config: FinetuneConfig) -> data.Limits:
    return data.Limits(
        config.max_train_examples,
        config.max_validation_examples,
        config.max_test_examples,
        config.shots,
        config.shots_per_class,
    )


def _tell(job: Job, dataset: data.Dataset, progress: Progress) -> None:
    """What a person should know about the dataset before trusting the scores."""
    for count, words in (
        (dataset.leaked, f"of {len(dataset.test)} test examples also stand in train or validation"),
        (dataset.repeated, "validation examples also stand in train"),
        (dataset.duplicated, "training examples repeat an earlier one"),
        (dataset.unlabelled, "examples without a label are left out"),
    ):
        if count:
            progress.note(f"{job.name}: {count} {words}")
    if dataset.regression and job.dataset.metric not in data.REGRESSION_METRICS:
        progress.note(f"{job.name}: the labels are numbers with fractions, so this is a regression, scored by spearman")


def _manifest(
    job: Job,
    dataset: data.Dataset,
    source: Checkpoint,
    base_digest: str,
    partial: Path,
    number: int,
    key: str,
    learned: _Learned,
    threads: int,
) -> Manifest:
    """The contribution's manifest, with the digests of what stands in `partial`."""
    config = job.config
    if config.lora_rank:
        written = open_adapter(LocalFolder(partial), job.name, source)
    else:
        written = open_checkpoint(LocalFolder(partial), job.name)
    before = source.manifest
    ancestor: dict[str, Any] = (
        manifest.shortened(before)
        if before
        else {"kind": "pretrained", "name": job.base.name, "body_digest": base_digest}
    )
    return {
        "kind": "contribution",
        "name": job.name,
        "iteration": number,
        "encoding": "adapter" if config.lora_rank else "full",
        "identity": key,
        "body_digest": body_digest(written),
        "outside_body": outside_body(written),
        "base": {"name": ancestor["name"], "body_digest": base_digest},
        "config": as_record(config),
        "environment": manifest.environment(_PACKAGES, device=learned.device, threads=threads),
        "license": job.dataset.license,
        "dataset": {
            "name": job.dataset.name,
            "fingerprint": dataset.fingerprint,
            "num_train": len(dataset.train),
            "num_validation": len(dataset.validation),
            "labels": list(dataset.labels),
        },
        "metrics": learned.metrics,
    }


def _train(
    job: Job, dataset: data.Dataset, partial: Path, number: int, threads: int, progress: Progress, peers: team.Team
) -> _Learned:
    """Train, save weights and pictures. Everything that needs torch is below here."""
    import torch

    from coldctl.core import model as models
    from coldctl.core import trainable
    from coldctl.core.fisher import write_fisher
    from coldctl.core.training import Examples, Head, Place, predict, train

    torch.set_num_threads(max(1, threads // peers.local_size))
    config = job.config
    seed = derived_seed(config.seed, "finetune", number, job.name)
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        base = job.base.local(Path(scratch))
        tokenizer = models.load_tokenizer(base)
        model = models.load_classifier(base, dataset.labels, seed, multilabel=dataset.multilabel)
    adapted = trainable.restrict(model, config, job.base.name, seed)
    length = models.length_limit(tokenizer, model.config, config.max_length)
    training, validation, test = (
        Examples(models.encode(tokenizer, split.texts, split.pairs, length), split.labels)
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    metric = data.metric_of(job.dataset, dataset)
    watching = job.watching
    log = (
        open_log(watching.log, Path(watching.folder), job.name, as_record(config))
        if watching.log and peers.leads
        else None
    )
    place = Place(
        models.device_of_choice(peers.local_rank), tokenizer.pad_token_id, partial / layout.TRAINING, progress, job.name,
        peers, log, watching.checkpoint_seconds,
    )  # fmt: skip
    head = Head(model, training, validation, lambda found: scoring.score(metric, validation.labels, found))
    trained = train([head], config, place, seed=seed)
    reached = scoring.score(metric, test.labels, predict(model, test.encoded, place))
    if log is not None:
        log.add(trained.steps, {"test": reached})
        log.close()
    if peers.leads:
        if config.fisher:
            write_fisher(model, training, place, partial, seed)
        if adapted is None:
            model.cpu().save_pretrained(partial)  # type: ignore[operator]
        else:
            trainable.save_adapter(adapted.cpu(), partial, job.base.name)
        training_chart(trained.curve, f"{job.name}: {trained.stopped}", metric, partial / layout.TRAINING_CHART)
    return _Learned(
        place.device.type,
        {"validation": {metric: trained.best_score}, "test": {metric: reached}},
        trained.examples / trained.seconds if trained.seconds else None,
        trained.stopped,
    )
