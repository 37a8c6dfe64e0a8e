"""`coldctl finetune`: make a contribution on data that stays where it is."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldctl.artifacts import layout, manifest, output, signatures
from coldctl.artifacts.model_ref import memory_needed
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import open_checkpoint
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
from coldctl.config.loading import as_record
from coldctl.data.datasets import Dataset, Limits, load_dataset, metric_of
from coldctl.data.labels import REGRESSION_METRICS
from coldctl.data.sources import is_hub
from coldctl.evaluation import scoring
from coldctl.evaluation.charts import training_chart
from coldctl.fusing.passes import verify_checkpoint
from coldctl.storage.local import LocalFolder
from coldctl.storage.location import is_url, locate
from coldctl.training import distributed
from coldctl.training.distributed import Team
from coldctl.training.jobs import Job, Prepared, identified
from coldctl.training.logs import open_log
from coldctl.workers.jobs import Engine, Needs, Outcome

if TYPE_CHECKING:  # it imports torch
    from coldctl.training.export import Learned


@dataclass(frozen=True)
class Finetuned:
    """Result of one job, for the summary line and `--json`."""

    name: str
    path: str
    unchanged: bool
    manifest: Mapping[str, Any]  # empty in a process of a team that writes nothing
    seconds: float
    train_examples_per_second: float | None
    stopped: str | None
    signed: bool = False


def finetune_all(
    jobs: Sequence[Job], engine: Engine, progress: Progress, announce: Callable[[Finetuned], None]
) -> list[Outcome[Finetuned]]:
    """Run the jobs, as many at once as `engine` allows, and `announce` each contribution when it is complete.

    Return the outcomes in the order of the jobs. A failed job stops no other. Raises TeamError if one of several processes
    of a training failed.
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


def finetune(job: Job, threads: int, progress: Progress) -> Finetuned:
    """Train one contribution into `job.destination` with `threads` CPU threads.

    A complete contribution of the same inputs is left as it is, and unfinished training resumes from its last checkpoint.
    Raises DataError, ModelError, OutputError, or DeclinedError if training fails.
    """
    started = time.perf_counter()
    team = distributed.find()
    key = job.options.sign_key
    with ExitStack() as stack:
        job, work, folder = _begin(job, team, stack, progress)
        destination = locate(job.destination)
        if folder is None:
            signed = key is not None and team.is_main and signatures.sign_complete(destination, key)
            return Finetuned(job.name, job.destination, True, manifest.read(destination), 0.0, None, None, signed)
        try:
            _log_inputs(job, work.dataset, progress)
            base = job.base.local()
            if is_url(
                job.base.place
            ):  # deltas are measured against the local copy, which is read faster than the store
                work = replace(work, base=open_checkpoint(LocalFolder(base), job.base.name))
            learned = _train(job, work, base, folder, threads, progress, team)
            document: Mapping[str, Any] = _complete(job, work, learned, folder, threads) if team.is_main else {}
        except (ColdctlError, OSError) as error:
            if isinstance(error, DeclinedError):  # resuming would fail again
                shutil.rmtree(folder / layout.TRAINING, ignore_errors=True)
            if team.size > 1:
                raise TeamError(f"{job.name}, process {team.rank}: {error}") from error
            raise
    if job.joins_run and layout.is_complete(layout.fused(destination.parent.parent.parent, work.iteration)):
        progress.note(
            f"iteration {work.iteration} is fused already: a later one takes {job.name} as a late contribution"
        )
    return Finetuned(
        job.name, job.destination, False, document, time.perf_counter() - started, learned.examples_per_second,
        learned.stopped, key is not None,
    )  # fmt: skip


def _begin(job: Job, team: Team, stack: ExitStack, progress: Progress) -> tuple[Job, Prepared, Path | None]:
    """Check the inputs and lock the output; return the folder to write to, or None if the contribution is complete.

    The returned job resumes training that was interrupted on an earlier base, if there is such. All processes of the team
    return alike, or raise what one of them raises.
    """
    work, folder = None, None
    error: ColdctlError | None = None
    try:
        job, work = _resumed(job, _prepared(job), progress)
        destination, overwrite = locate(job.destination), job.options.overwrite
        if team.is_main and not output.is_done(destination, work.key, overwrite=overwrite):
            workdir = output.local_workdir(destination, work.key, overwrite=overwrite, progress=progress)
            folder = stack.enter_context(workdir)
    except OutputError as caught:
        others = ", or another --name if it is another contributor's" if job.joins_run else ""
        error = type(caught)(f"{caught.message}{others}", caught.details)
    except ColdctlError as caught:
        error = caught
    team.check_agreement(work.key if work else None, error)
    assert work is not None
    if team.broadcast(folder is None):
        return job, work, None
    if folder is None:  # this process computes its share and writes nothing
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldctl-")))
    return job, work, folder


def _prepared(job: Job) -> Prepared:
    """Read the dataset and verify the base. Raises ConfigError, DataError, ModelError or OutputError."""
    data = [] if is_hub(job.dataset.path) else [job.dataset.path]
    output.refuse_overlap(locate(job.destination), [job.base.place, *data])
    if job.options.sign_key is not None:
        signatures.check_private_key(job.options.sign_key)
    if job.options.log.kind:
        _check_log_folder(job)
    config = job.config
    limits = Limits(
        config.max_train_examples, config.max_validation_examples, config.max_test_examples, config.shots,
        config.shots_per_class,
    )  # fmt: skip
    dataset = load_dataset(job.dataset, limits, config.seed)
    if dataset.regression or dataset.multilabel:
        flags = {"--class-weights": config.class_weights != "none", "--label-smoothing": config.label_smoothing}
        for flag in (flag for flag, is_set in flags.items() if is_set):
            raise DataError(f"{dataset.name}: {flag} is for one class per example, its labels are others: leave it out")
    base = open_checkpoint(job.base.folder, job.base.name)
    verify_checkpoint(base)
    return identified(job, dataset, base)


def _check_log_folder(job: Job) -> None:
    """Raise ConfigError for a log inside the contribution: it would be published, and block the output."""
    place, folder = locate(job.destination).resolve(), Path(job.options.log.folder).resolve()
    if place in (folder, folder / job.name) or place in folder.parents:
        raise ConfigError(
            f"--log-folder {job.options.log.folder} lies in the contribution {place}: give one outside of it"
        )


def _resumed(job: Job, work: Prepared, progress: Progress) -> tuple[Job, Prepared]:
    """Return job and inputs on the earlier base where training of the same contribution was interrupted, if it was."""
    if layout.is_complete(locate(job.destination)):
        return job, work
    for training in job.interrupted:
        earlier = replace(job, base=training.base, destination=training.destination, iteration=training.iteration)
        base = open_checkpoint(earlier.base.folder, earlier.base.name)
        earlier_work = identified(earlier, work.dataset, base)
        if output.partial_identity(locate(training.destination)) != earlier_work.key:
            continue
        if job.options.overwrite:
            with suppress(OutputError):
                output.discard_partial(locate(training.destination))
            continue
        verify_checkpoint(base)
        progress.note(
            f"{job.name}: going on with what was begun on the base of iteration {training.iteration}; "
            "--overwrite starts anew on the newest"
        )
        return earlier, earlier_work
    return job, work


def _log_inputs(job: Job, dataset: Dataset, progress: Progress) -> None:
    """Log what matters for trusting base and scores."""
    if words := sanitize.note_on(job.base.folder):
        progress.note(f"{job.base.name} {words}")
    for sentence in dataset.overlaps():
        progress.note(f"{job.name}: {sentence}")
    if dataset.unlabelled:
        progress.note(f"{job.name}: {dataset.unlabelled} examples without a label are left out")
    if dataset.regression and job.dataset.metric not in REGRESSION_METRICS:
        progress.note(f"{job.name}: the labels are numbers with fractions, so this is a regression, scored by spearman")


def _train(
    job: Job, work: Prepared, base: Path, folder: Path, threads: int, progress: Progress, team: Team
) -> "Learned":
    """Train, then write weights, Fisher information and the chart. Torch is imported here and in `_complete` only."""
    import torch

    from coldctl.training import model as models
    from coldctl.training.batches import Examples
    from coldctl.training.export import Learned, write_weights
    from coldctl.training.fisher import write_fisher
    from coldctl.training.loop import Task, TrainingContext, predict, train
    from coldctl.training.trainable import configure_trainable

    torch.set_num_threads(max(1, threads // team.local_size))
    config, dataset, options = job.config, work.dataset, job.options.log
    seed = derived_seed(config.seed, "finetune", work.iteration, job.name)
    tokenizer = models.load_tokenizer(base)
    model = models.load_classifier(base, dataset.labels, seed, multilabel=dataset.multilabel)
    adapted = configure_trainable(model, config, job.base.name, seed)
    length = models.length_limit(tokenizer, model.config, config.max_length)
    training, validation, test = (
        Examples(models.encode(tokenizer, split.texts, split.pairs, length), split.labels)
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    metric = metric_of(job.dataset, dataset)
    log = None
    if options.kind and team.is_main:
        log = open_log(options.kind, Path(options.folder), job.name, as_record(config))
    with closing(log) if log else nullcontext():
        context = TrainingContext(
            models.device_of_choice(team.local_rank), tokenizer.pad_token_id, folder / layout.TRAINING, progress,
            job.name, team, log, options.checkpoint_seconds,
        )  # fmt: skip
        task = Task(model, training, validation, lambda predicted: scoring.score(metric, validation.labels, predicted))
        trained = train([task], config, context, seed=seed)
        test_score = scoring.score(metric, test.labels, predict(model, test.encoded, context))
        if log is not None:
            log.add(trained.steps, {"test": test_score})
    if team.is_main:
        if config.fisher:
            write_fisher(model, training, context, folder, seed)
        with as_os_errors():
            write_weights(model, adapted, folder, work.base, config, job.name, progress)
        training_chart(trained.curve, f"{job.name}: {trained.stopped}", metric, folder / layout.TRAINING_CHART)
    return Learned(
        context.device.type,
        {"validation": {metric: trained.best_score}, "test": {metric: test_score}},
        trained.examples / trained.seconds if trained.seconds else None,
        trained.seconds,
        trained.stopped,
    )


def _complete(job: Job, work: Prepared, learned: "Learned", folder: Path, threads: int) -> Mapping[str, Any]:
    """Write the manifest, then the signature, which covers it; return the manifest."""
    from coldctl.training.export import write_manifest

    document = write_manifest(job, work, learned, folder, threads)
    if job.options.sign_key is not None:
        signatures.sign(folder, job.options.sign_key)
    return document
