"""Jobs of `finetune`: which contributions, from which base, and where to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldctl.artifacts import layout, output, run
from coldctl.artifacts.model_ref import Model, resolve
from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.common.digests import derived_seed
from coldctl.common.errors import ConfigError
from coldctl.config.loading import check_name, identity
from coldctl.config.settings import DatasetConfig, FinetuneConfig, contributors_of, settled_finetuning
from coldctl.data.datasets import Dataset
from coldctl.storage.location import Location, locate


@dataclass(frozen=True)
class LogOptions:
    """Log and checkpoints of a training; they change nothing of the contribution."""

    kind: str | None = None  # of `logs.KINDS`
    folder: str = "coldctl-logs"
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True)
class JobOptions:
    """Options of a job that are no part of the contribution's identity."""

    overwrite: bool = False
    log: LogOptions = LogOptions()
    sign_key: Path | None = None


@dataclass(frozen=True)
class InterruptedTraining:
    """Unfinished training of the same contributor for an earlier iteration of the run."""

    base: Model
    destination: str
    iteration: int


@dataclass(frozen=True)
class Job:
    """One contribution to make, as plain values that can be sent to another process."""

    dataset: DatasetConfig
    base: Model
    destination: str
    name: str
    config: FinetuneConfig
    options: JobOptions
    iteration: int | None = None
    joins_run: bool = False  # a single contribution to a RUN, which may resume `interrupted` training
    interrupted: tuple[InterruptedTraining, ...] = ()

    @property
    def title(self) -> str:
        """Return the contribution's name, for messages."""
        return self.name


@dataclass(frozen=True)
class Prepared:
    """Inputs of a job, read and checked, and the identity of its contribution."""

    dataset: Dataset
    base: Checkpoint
    base_digest: str
    iteration: int
    key: str


def jobs_of_suite(
    datasets: Sequence[DatasetConfig],
    base: Model,
    destination: Location,
    config: FinetuneConfig,
    options: JobOptions,
    *,
    sample: int | None = None,
    only: Sequence[str] = (),
) -> list[Job]:
    """Return one job per contributor of the suite's seen datasets, or per sampled one, or per one named in `only`.

    In a RUN the contributions belong to the iteration that starts from `base`, and the run's own setting is the default
    of `sample`. Raises ConfigError.
    """
    config = settled_finetuning(config)
    contributors = contributors_of(datasets)
    if not contributors:
        raise ConfigError('the suite has no seen dataset: mark those that contribute with role = "seen"')
    names = [name for name, _ in contributors]
    if unknown := sorted(set(only) - {*names, *(dataset.name for _, dataset in contributors)}):
        raise ConfigError(f"no seen dataset is called {unknown[0]!r}: the suite has {', '.join(names)}")
    folder, iteration, seed = destination, None, config.seed
    if run.is_run(destination):
        current = run.read(destination)
        iteration, seed = _iteration_on(current, base), current.seed
        sample = current.sample if sample is None else sample
        folder = layout.contributions(destination, iteration)
    chosen = contributors
    if only:
        chosen = [(name, dataset) for name, dataset in contributors if name in only or dataset.name in only]
    elif sample and sample < len(contributors):
        generator = np.random.default_rng(derived_seed(seed, "contributors", iteration or 1))
        chosen = [contributors[index] for index in sorted(generator.permutation(len(contributors))[:sample].tolist())]
    return [Job(dataset, base, str(folder / name), name, config, options, iteration) for name, dataset in chosen]


def single_job(
    dataset: DatasetConfig,
    base: Model,
    destination: Location,
    config: FinetuneConfig,
    options: JobOptions,
    *,
    name: str | None = None,
) -> Job:
    """Return the job of one contribution. In a RUN it belongs to the iteration that starts from `base`, even if fused.

    Training of the same contribution that was interrupted in an earlier iteration can resume there, on its own base:
    finished work is worth more than a newer base, and late contributions are still fused. Raises ConfigError.
    """
    config = settled_finetuning(config)
    name = name or dataset.name
    check_name(name, "--name")
    if not run.is_run(destination):
        return Job(dataset, base, str(destination), name, config, options)
    current = run.read(destination)
    iteration = _iteration_on(current, base)
    place = layout.contributions(destination, iteration) / name
    if options.overwrite and layout.is_complete(place) and layout.is_complete(layout.fused(destination, iteration)):
        raise ConfigError(
            f"{place} has been fused already, --overwrite would leave the fused model without it: give another --name, "
            f"or wait until iteration {iteration} is promoted"
        )
    interrupted = []
    for earlier, model in current.bases.items():
        folder = layout.contributions(destination, earlier) / name
        if earlier < iteration and output.partial_identity(folder) is not None:
            interrupted.append(InterruptedTraining(resolve(model, current.revision), str(folder), earlier))
    return Job(
        dataset, base, str(place), name, config, options, iteration, joins_run=True, interrupted=tuple(interrupted)
    )


def identified(job: Job, dataset: Dataset, base: Checkpoint) -> Prepared:
    """Return the job's inputs with the identity that follows from them."""
    base_digest = base.manifest["body_digest"] if base.manifest else body_digest(base)
    earlier = base.manifest.get("iteration") if base.manifest else None
    iteration = job.iteration or (earlier or 0) + 1
    key = identity(
        "finetune", job.config, base=base_digest, dataset=dataset.fingerprint, name=job.name, metric=job.dataset.metric,
        iteration=iteration, license=job.dataset.license,
    )  # fmt: skip
    return Prepared(dataset, base, base_digest, iteration, key)


def _iteration_on(current: run.Run, base: Model) -> int:
    """Return the newest iteration that starts from a base; the next one for a base that is none of the run's."""
    for number, model in current.bases.items():
        place = resolve(model, current.revision).place
        if str(locate(place).resolve()) == str(locate(base.place).resolve()):
            return number
    return current.decided + 1
