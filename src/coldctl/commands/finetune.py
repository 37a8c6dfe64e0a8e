"""`coldctl finetune`: make a contribution: body and fresh head, trained on data that stays where it is."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.artifacts import layout, manifest, output, run, signatures
from coldctl.artifacts.manifest import Manifest
from coldctl.artifacts.model_ref import Model, memory_needed, resolve
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import Checkpoint, body_digest, open_checkpoint, outside_body
from coldctl.checkpoints.deltas import ENCODINGS
from coldctl.common.digests import derived_seed
from coldctl.common.errors import (
    ColdctlError,
    ConfigError,
    DataError,
    DeclinedError,
    OutputError,
    TeamError,
    as_os_errors,
)
from coldctl.common.progress import Progress
from coldctl.config.loading import as_record, check_name, identity
from coldctl.config.settings import DatasetConfig, FinetuneConfig, contributors_of, settled_finetuning
from coldctl.data.datasets import Dataset, Limits, load_dataset, metric_of
from coldctl.data.labels import REGRESSION_METRICS
from coldctl.data.sources import is_hub
from coldctl.evaluation import scoring
from coldctl.evaluation.charts import training_chart
from coldctl.fusing.passes import prove
from coldctl.storage.local import LocalFolder
from coldctl.storage.location import Location, is_url, locate
from coldctl.training import distributed
from coldctl.training.logs import Log, open_log
from coldctl.workers.jobs import Engine, Needs, Outcome

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Watching:
    """How a training is followed and kept safe; nothing of it changes the contribution."""

    log: str | None = None
    folder: str = "coldctl-logs"
    checkpoint_seconds: float = 60.0


_UNWATCHED = Watching()


@dataclass(frozen=True)
class Begun:
    """Unfinished training of a contribution to an earlier iteration of a RUN."""

    base: Model
    destination: str
    iteration: int


@dataclass(frozen=True)
class Job:
    """One contribution to be made. Plain values only, so that it can go to another process.

    One that `joins` a RUN may go on with training that was `begun` on an earlier base.
    """

    dataset: DatasetConfig
    base: Model
    destination: str
    name: str
    config: FinetuneConfig
    iteration: int | None = None
    overwrite: bool = False
    watching: Watching = _UNWATCHED
    sign_key: Path | None = None  # no part of the identity: what is complete can be signed as it is
    joins: bool = False
    begun: tuple[Begun, ...] = ()

    @property
    def title(self) -> str:
        """The contribution's name, for messages."""
        return self.name


@dataclass(frozen=True)
class Finetuned:
    """What one job did, for the summary line and `--json`."""

    name: str
    path: str
    unchanged: bool
    manifest: Mapping[str, Any]  # empty in a process of a team that writes nothing
    seconds: float
    train_examples_per_second: float | None
    stopped: str | None
    signed: bool = False


def finetune(job: Job, threads: int, progress: Progress) -> Finetuned:
    """Train one contribution into `job.destination` with `threads` CPU threads.

    Raises DataError, ModelError or OutputError; a complete contribution of the same inputs is left alone, and
    unfinished training goes on from its last checkpoint.
    """
    started = time.perf_counter()
    peers = distributed.find()
    error: ColdctlError | None = None
    with ExitStack() as stack:
        work, folder = None, None
        try:
            job, work = _gone_on_with(job, _prepared(job), progress)
            destination = locate(job.destination)
            if peers.leads and not output.is_done(destination, work.key, overwrite=job.overwrite):
                working = output.local_workdir(destination, work.key, overwrite=job.overwrite, progress=progress)
                folder = stack.enter_context(working)
        except OutputError as caught:
            others = ", or another --name if it is another contributor's" if job.joins else ""
            error = type(caught)(f"{caught.message}{others}", caught.details)
        except ColdctlError as caught:
            error = caught
        if _together(peers, work, error, done=folder is None):
            signed = job.sign_key is not None and peers.leads and signatures.sign_complete(destination, job.sign_key)
            return Finetuned(job.name, job.destination, True, manifest.read(destination), 0.0, None, None, signed)
        assert work is not None
        if folder is None:  # a process that computes its share and writes nothing
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldctl-")))
        try:
            if words := sanitize.note_on(job.base.folder):
                progress.note(f"{job.base.name} {words}")
            _tell(job, work.dataset, progress)
            base = job.base.local()
            if is_url(job.base.place):  # what is sent is measured against the base: its copy is read, not the store
                work = replace(work, source=open_checkpoint(LocalFolder(base), job.base.name))
            trained = _train(job, work, base, folder, threads, progress, peers)
            document: Mapping[str, Any] = _manifest(job, work, folder, trained, threads) if peers.leads else {}
            if peers.leads and job.sign_key is not None:
                signatures.sign(folder, job.sign_key)
        except (ColdctlError, OSError) as caught:
            if isinstance(caught, DeclinedError):  # there is nothing to go on from
                shutil.rmtree(folder / layout.TRAINING, ignore_errors=True)
            if peers.size > 1:
                raise TeamError(f"{job.name}, process {peers.rank}: {caught}") from caught
            raise
    if (
        job.joins
        and job.iteration
        and layout.is_complete(layout.fused(destination.parent.parent.parent, job.iteration))
    ):
        progress.note(
            f"iteration {job.iteration} is fused already: a later one takes {job.name} as a late contribution"
        )
    seconds = time.perf_counter() - started
    signed = job.sign_key is not None
    return Finetuned(job.name, job.destination, False, document, seconds, trained.rate, trained.stopped, signed)


def jobs_of_suite(
    datasets: Sequence[DatasetConfig],
    base: Model,
    destination: Location,
    config: FinetuneConfig,
    *,
    sample: int | None,
    only: Sequence[str],
    overwrite: bool,
    watching: Watching = _UNWATCHED,
    sign_key: Path | None = None,
) -> list[Job]:
    """One job per contributor of the suite's seen datasets, or per sampled one, or per one named in `only`.

    In a RUN the contributions belong to the iteration that starts from `base`, and whether and how many are sampled is the run's
    own setting unless given. Raises ConfigError.
    """
    config = settled_finetuning(config)
    seen = contributors_of(datasets)
    if not seen:
        raise ConfigError('the suite has no seen dataset: mark those that contribute with role = "seen"')
    names = [name for name, _ in seen]
    if unknown := sorted(set(only) - {*names, *(dataset.name for _, dataset in seen)}):
        raise ConfigError(f"no seen dataset is called {unknown[0]!r}: the suite has {', '.join(names)}")
    number, seed = None, config.seed
    folder = destination
    if run.is_run(destination):
        found = run.read(destination)
        number, seed = _iteration_on(found, base), found.seed
        sample = found.sample if sample is None else sample
        folder = layout.contributions(destination, number)
    chosen = seen
    if sample and sample < len(seen):
        order = np.random.default_rng(derived_seed(seed, "contributors", number or 1)).permutation(len(seen))
        chosen = [seen[index] for index in sorted(order[:sample].tolist())]
    if only:
        chosen = [(name, dataset) for name, dataset in seen if name in only or dataset.name in only]
    return [
        Job(dataset, base, str(folder / name), name, config, number, overwrite, watching, sign_key)
        for name, dataset in chosen
    ]


def single_job(
    dataset: DatasetConfig,
    base: Model,
    destination: Location,
    config: FinetuneConfig,
    *,
    name: str | None,
    overwrite: bool,
    watching: Watching = _UNWATCHED,
    sign_key: Path | None = None,
) -> Job:
    """The job of one contribution; in a RUN it goes to the iteration that starts from `base`, fused already or not.

    Training of the same contribution that was interrupted in an earlier iteration goes on there, on the base it began
    with: work done is worth more than a newer base, and late ones are not lost. Raises ConfigError.
    """
    config = settled_finetuning(config)
    called = name or dataset.name
    check_name(called, "--name")
    if not run.is_run(destination):
        return Job(dataset, base, str(destination), called, config, None, overwrite, watching, sign_key)
    found = run.read(destination)
    number = _iteration_on(found, base)
    place = layout.contributions(destination, number) / called
    if overwrite and layout.is_complete(place) and layout.is_complete(layout.fused(destination, number)):
        raise ConfigError(
            f"{place} has been fused already, --overwrite would leave the fused model without it: give another --name, "
            f"or wait until iteration {number} is promoted"
        )
    begun = [
        Begun(resolve(start, found.revision), str(layout.contributions(destination, earlier) / called), earlier)
        for earlier, start in found.bases.items()
        if earlier < number and output.partial_identity(layout.contributions(destination, earlier) / called) is not None
    ]
    return Job(
        dataset, base, str(place), called, config, number, overwrite, watching, sign_key, joins=True, begun=tuple(begun)
    )


def _iteration_on(found: run.Run, base: Model) -> int:
    """The newest iteration that starts from a base; the next one for a base that is none of the run's."""
    for number, place in found.bases.items():
        known = resolve(place, found.revision).place
        if str(locate(known).resolve()) == str(locate(base.place).resolve()):
            return number
    return found.decided + 1


def _gone_on_with(job: Job, work: "_Prepared", progress: Progress) -> "tuple[Job, _Prepared]":
    """The same contribution where its training was interrupted on an earlier base, if it was and is still the same."""
    if layout.is_complete(locate(job.destination)):
        return job, work
    for before in job.begun:
        again = replace(job, base=before.base, destination=before.destination, iteration=before.iteration)
        source = open_checkpoint(again.base.folder, again.base.name)
        earlier = _identified(again, work.dataset, source)
        if output.partial_identity(locate(before.destination)) != earlier.key:
            continue
        if job.overwrite:
            with suppress(OutputError):
                output.discard_partial(locate(before.destination))
            continue
        prove(source)
        progress.note(
            f"{job.name}: going on with what was begun on the base of iteration {before.iteration}; "
            "--overwrite starts anew on the newest"
        )
        return again, earlier
    return job, work


def finetune_all(
    jobs: Sequence[Job], engine: Engine, progress: Progress, announce: Callable[[Finetuned], None]
) -> list[Outcome[Finetuned]]:
    """Run the jobs, as many side by side as `engine` has it, and `announce` each contribution as it is done.

    The outcomes are in the order of the jobs. One failure stops no other, but for that of one process among several.
    """
    outcomes = []
    bases = {job.base for job in jobs}
    needs = Needs(max((memory_needed(base, training=True) for base in bases), default=0), gpu=True)
    for outcome in engine.run(finetune, jobs, progress, needs):
        if isinstance(outcome.error, TeamError):
            raise outcome.error
        outcomes.append(outcome)
        if outcome.result is not None:
            announce(outcome.result)
    return sorted(outcomes, key=lambda outcome: outcome.index)


@dataclass(frozen=True)
class _Prepared:
    """What a job is made from, and its identity."""

    dataset: Dataset
    source: Checkpoint
    base_digest: str
    number: int
    key: str


@dataclass(frozen=True)
class _Learned:
    """What `_train` leaves to be written down."""

    device: str
    metrics: dict[str, dict[str, float]]
    rate: float | None
    seconds: float
    stopped: str


def _prepared(job: Job) -> _Prepared:
    """Read the dataset and the base's headers."""
    output.refuse_overlap(
        locate(job.destination), [job.base.place, *([] if is_hub(job.dataset.path) else [job.dataset.path])]
    )
    if job.sign_key is not None:
        signatures.check_private_key(job.sign_key)
    if job.watching.log:
        _refuse_log_inside(job)
    dataset = load_dataset(job.dataset, _limits(job.config), job.config.seed)
    if dataset.regression or dataset.multilabel:
        for flag, given in (
            ("--class-weights", job.config.class_weights != "none"),
            ("--label-smoothing", job.config.label_smoothing),
        ):
            if given:
                raise DataError(
                    f"{dataset.name}: {flag} is for one class per example, its labels are others: leave it out"
                )
    source = open_checkpoint(job.base.folder, job.base.name)
    prove(source)
    return _identified(job, dataset, source)


def _identified(job: Job, dataset: Dataset, source: Checkpoint) -> _Prepared:
    base_digest = source.manifest["body_digest"] if source.manifest else body_digest(source)
    earlier = source.manifest.get("iteration") if source.manifest else None
    number = job.iteration or (earlier or 0) + 1
    key = identity(
        "finetune", job.config, base=base_digest, dataset=dataset.fingerprint, name=job.name, metric=job.dataset.metric,
        iteration=number, license=job.dataset.license,
    )  # fmt: skip
    return _Prepared(dataset, source, base_digest, number, key)


def _refuse_log_inside(job: Job) -> None:
    """A log inside the contribution would go to strangers with it, and stand in the way of writing it."""
    place, folder = locate(job.destination).resolve(), Path(job.watching.folder).resolve()
    if place in (folder, folder / job.name) or place in folder.parents:
        raise ConfigError(
            f"--log-folder {job.watching.folder} lies in the contribution {place}: give one outside of it"
        )


def _together(peers: distributed.Team, work: _Prepared | None, error: ColdctlError | None, *, done: bool) -> bool:
    """Let all processes of a team raise what one of them found; return whether the leader has nothing to do."""
    if peers.size == 1:
        if error is not None:
            raise error
        return done
    found = peers.gathered((work.key if work else None, error))
    for rank, (_, theirs) in enumerate(found):
        if theirs is not None:
            raise type(theirs)(f"process {rank}: {theirs.message}" if rank else theirs.message, theirs.details)
    if len({key for key, _ in found}) > 1:
        raise ConfigError("the processes see different data or bases: give all of them the same files and flags")
    return peers.agreed(done)


def _limits(config: FinetuneConfig) -> Limits:
    return Limits(
        config.max_train_examples,
        config.max_validation_examples,
        config.max_test_examples,
        config.shots,
        config.shots_per_class,
    )


def _tell(job: Job, dataset: Dataset, progress: Progress) -> None:
    """What a person should know about the dataset before trusting the scores."""
    for sentence in dataset.overlaps():
        progress.note(f"{job.name}: {sentence}")
    if dataset.unlabelled:
        progress.note(f"{job.name}: {dataset.unlabelled} examples without a label are left out")
    if dataset.regression and job.dataset.metric not in REGRESSION_METRICS:
        progress.note(f"{job.name}: the labels are numbers with fractions, so this is a regression, scored by spearman")


def _manifest(job: Job, work: _Prepared, folder: Path, learned: _Learned, threads: int) -> Manifest:
    """Complete the contribution in `folder`: tokenizer files, no checkpoints any more, the manifest last."""
    from coldctl.training.export import encoding_of, open_written

    config = job.config
    encoding = encoding_of(config)
    if encoding not in ENCODINGS:  # a difference is never used but with its base
        sanitize.copy_tokenizer(work.source.folder, folder)
    written = open_written(folder, job.name, work.source, config)
    before = work.source.manifest
    ancestor: manifest.GenerationRecord = (
        manifest.shortened(before)
        if before
        else {"kind": "pretrained", "name": job.base.name, "body_digest": work.base_digest}
    )
    document: Manifest = {
        "kind": "contribution",
        "name": job.name,
        "iteration": work.number,
        "encoding": encoding,
        "identity": work.key,
        "body_digest": body_digest(written),
        "outside_body": outside_body(written),
        "base": {"name": ancestor["name"], "body_digest": work.base_digest},
        "config": as_record(config),
        "environment": manifest.environment(
            _PACKAGES, device=learned.device, threads=threads, training_seconds=round(learned.seconds, 1)
        ),
        "license": job.dataset.license,
        "dataset": {
            "name": job.dataset.name,
            **({"source": job.dataset.path.removeprefix("hf:")} if is_hub(job.dataset.path) else {}),
            "fingerprint": work.dataset.fingerprint,
            "num_train": len(work.dataset.train),
            "num_validation": len(work.dataset.validation),
            "num_test": len(work.dataset.test),
            **({"num_labels": len(work.dataset.labels)} if config.body_only else {"labels": list(work.dataset.labels)}),
        },
        "metrics": learned.metrics,
    }
    whole = manifest.write(folder, document)
    shutil.rmtree(folder / layout.TRAINING, ignore_errors=True)  # until now a killed call could go on from there
    return whole


def _train(
    job: Job, work: _Prepared, base: Path, folder: Path, threads: int, progress: Progress, peers: distributed.Team
) -> _Learned:
    """Train, save weights and pictures. Everything that needs torch is below here."""
    import torch

    from coldctl.training import model as models
    from coldctl.training import trainable
    from coldctl.training.export import write_weights
    from coldctl.training.fisher import write_fisher
    from coldctl.training.loop import Examples, Head, Place, predict, train

    torch.set_num_threads(max(1, threads // peers.local_size))
    config, dataset = job.config, work.dataset
    seed = derived_seed(config.seed, "finetune", work.number, job.name)
    tokenizer = models.load_tokenizer(base)
    model = models.load_classifier(base, dataset.labels, seed, multilabel=dataset.multilabel)
    adapted = trainable.restrict(model, config, job.base.name, seed)
    length = models.length_limit(tokenizer, model.config, config.max_length)
    training, validation, test = (
        Examples(models.encode(tokenizer, split.texts, split.pairs, length), split.labels)
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    metric = metric_of(job.dataset, dataset)
    with _log(job, peers) as log:
        place = Place(
            models.device_of_choice(peers.local_rank), tokenizer.pad_token_id, folder / layout.TRAINING, progress,
            job.name, peers, log, job.watching.checkpoint_seconds,
        )  # fmt: skip
        head = Head(model, training, validation, lambda found: scoring.score(metric, validation.labels, found))
        trained = train([head], config, place, seed=seed)
        reached = scoring.score(metric, test.labels, predict(model, test.encoded, place))
        if log is not None:
            log.add(trained.steps, {"test": reached})
    if peers.leads:
        if config.fisher:
            write_fisher(model, training, place, folder, seed)
        with as_os_errors():
            write_weights(model, adapted, folder, work.source, config, job.name, progress)
        training_chart(trained.curve, f"{job.name}: {trained.stopped}", metric, folder / layout.TRAINING_CHART)
    return _Learned(
        place.device.type,
        {"validation": {metric: trained.best_score}, "test": {metric: reached}},
        trained.examples / trained.seconds if trained.seconds else None,
        trained.seconds,
        trained.stopped,
    )


@contextmanager
def _log(job: Job, peers: distributed.Team) -> Iterator[Log | None]:
    """The log that was asked for, in the process that leads."""
    kind = job.watching.log
    if not kind or not peers.leads:
        yield None
        return
    log = open_log(kind, Path(job.watching.folder), job.name, as_record(job.config))
    try:
        yield log
    finally:
        log.close()
