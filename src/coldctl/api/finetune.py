"""`coldctl.finetune` and `coldctl.finetune_suite`."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from coldctl.api.keywords import Base, Making, Place, Settings, Workers, with_keywords
from coldctl.api.objects import Contribution, SuiteError
from coldctl.commands import finetune as command
from coldctl.common.errors import ColdctlError, ConfigError
from coldctl.config.fields import settings_of
from coldctl.config.loading import read, read_suite, resolve
from coldctl.config.settings import DatasetConfig, FinetuneConfig
from coldctl.data.datasets import config_from_reference
from coldctl.storage.location import locate
from coldctl.training import distributed
from coldctl.training.jobs import Job, JobOptions, LogOptions, jobs_of_suite, single_job
from coldctl.training.logs import check_kind
from coldctl.workers.jobs import Engine


@with_keywords
def finetune(
    data: Place,
    *,
    base: Base,
    making: Making,
    columns: Annotated[Settings, DatasetConfig, "text", "text_pair", "label", "license"],
    settings: Annotated[Settings, FinetuneConfig],
    options: Workers,
    name: str | None = None,
) -> Contribution:
    """Make a contribution: train body and head on one dataset.

    `data` is a directory with train, validation and test files, a file, or hf:NAME. The contribution is called `name`,
    by default after the data. Unfinished training goes on from its last checkpoint.

    Raises ConfigError, DataError, ModelError or OutputError.
    """
    config = resolve(FinetuneConfig, read(options.file), settings)
    place = str(data)
    known = settings_of(DatasetConfig)
    chosen = {key: known[key].check(value, "finetune()") for key, value in columns.items()}
    dataset = config_from_reference(place, DatasetConfig(**{"name": "", "path": place, **chosen}))
    with _engine(options) as engine:
        job = single_job(
            dataset, base.model(), locate(str(making.output)), config, _job_options(making, options), name=name
        )
        made, failed = _trained([job], engine, options)
    for error in failed.values():
        raise error
    return made[0]


@with_keywords
def finetune_suite(
    suite: Place,
    *,
    base: Base,
    making: Making,
    settings: Annotated[Settings, FinetuneConfig],
    options: Workers,
    sample: int | None = None,
    only: Sequence[str] = (),
) -> list[Contribution]:
    """Make one contribution per seen dataset of a suite's TOML file.

    `sample` is the number of contributors to draw, 0 for all; `only` names the datasets to train on.

    Raises SuiteError if some contributions failed (of a single one its own error), ConfigError, ModelError or OutputError.
    """
    datasets, file = read_suite(Path(suite), options.file)
    config = resolve(FinetuneConfig, file, settings)
    with _engine(options) as engine:
        jobs = jobs_of_suite(
            datasets, base.model(), locate(str(making.output)), config, _job_options(making, options),
            sample=sample, only=[only] if isinstance(only, str) else only,
        )  # fmt: skip
        made, failed = _trained(jobs, engine, options)
    if len(jobs) == 1:
        for error in failed.values():
            raise error
    if failed:
        raise SuiteError(
            f"{len(failed)} of {len(jobs)} contributions failed: mend the cause and repeat just these with "
            f"--only {shlex.quote(','.join(failed))}",
            made,
            failed,
        )
    return made


@contextmanager
def _engine(options: Workers) -> Iterator[Engine]:
    """Yield the engine that was asked for; in a process of a team (torchrun) this process alone. Raises ConfigError."""
    alone = distributed.find().size == 1
    if not alone and options.engine != "local":
        raise ConfigError(f"--engine {options.engine} does not go with torchrun: leave one of them out")
    with closing(options.workers(threads=options.threads if alone else None, jobs=None if alone else 1)) as engine:
        yield engine
        distributed.disband()


def _job_options(making: Making, options: Workers) -> JobOptions:
    if making.log is not None:
        check_kind(making.log)
    log = LogOptions(making.log, str(making.log_folder), making.checkpoint_seconds)
    return JobOptions(options.overwrite, log, Path(making.sign_key) if making.sign_key else None)


def _trained(
    jobs: Sequence[Job], engine: Engine, options: Workers
) -> tuple[list[Contribution], dict[str, ColdctlError]]:
    """Return the contributions that were made, and the errors by name."""
    if distributed.find().rank != 0:  # the first process of a team speaks for all
        options = replace(options, progress=False)
    with options.listener() as progress:
        outcomes = command.finetune_all(jobs, engine, progress, lambda done: progress.note(_line(done)))
    made = [outcome.result for outcome in outcomes if outcome.result is not None]
    return (
        [Contribution(**{**vars(done), "path": locate(done.path)}) for done in made],
        {jobs[outcome.index].name: outcome.error for outcome in outcomes if outcome.error is not None},
    )


def _line(done: command.Finetuned) -> str:
    metrics = done.manifest.get("metrics", {})
    scores = ", ".join(
        f"{split} {metric} {value:.1f}" for split, values in metrics.items() for metric, value in values.items()
    )
    if done.unchanged:
        what = "signed" if done.signed else "left alone"
        return f"{done.name}: complete already ({scores}), {what}: {done.path}"
    speed = f" {done.train_examples_per_second:.0f} examples/s;" if done.train_examples_per_second else ""
    return f"{done.name}: {scores}; {done.stopped};{speed} {done.seconds:.0f} s: {done.path}"
