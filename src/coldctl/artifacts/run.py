"""`run.json`: a run's pretrained model, config, target and decisions.

An iteration is decided when it stands in `iterations`; its fused model is then promoted or not. The next
base model is the last promoted one, else the pretrained model.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace

import msgspec

from coldctl.artifacts import layout
from coldctl.common.errors import ConfigError, ManifestError, OutputError
from coldctl.common.parsing import find_mismatch, json_value
from coldctl.storage import conditional_write
from coldctl.storage.conditional_write import Version
from coldctl.storage.location import Location

SCHEMA = 1


@dataclass(frozen=True)
class Iteration:
    """The decision about one iteration."""

    number: int
    promoted: bool
    body_digest: str
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """`run.json` as it is stored. `base` is a MODEL; a path in it is relative to the run's folder."""

    schema: int
    base: str
    revision: str | None
    config_digest: str
    sample: int
    seed: int
    gate: bool
    target: int
    iterations: tuple[Iteration, ...]


@dataclass(frozen=True, kw_only=True)
class Run(RunFile):
    """A run: its `run.json` and where it is.

    `version` is the file that it was read from, so that another command's decision is not overwritten.
    """

    folder: Location
    version: Version | None = field(default=None, compare=False, repr=False)

    @property
    def decided(self) -> int:
        """Return the number of iterations that are finished and decided."""
        return len(self.iterations)

    @property
    def pretrained(self) -> str:
        """Return the MODEL where iteration 1 starts, with a relative path made absolute."""
        if self.base.startswith("."):
            return str((self.folder / self.base).resolve())
        return self.base

    @property
    def bases(self) -> dict[int, str]:
        """Return the MODELs that contributors have started from, and will now, newest first.

        The key is the newest iteration that starts from each: a contribution to it is made on that base.
        """
        place, newest = self.pretrained, {self.pretrained: 1}
        for iteration in self.iterations:
            place = str(layout.fused(self.folder, iteration.number)) if iteration.promoted else place
            newest[place] = iteration.number + 1
        return {number: place for place, number in reversed(newest.items())}

    @property
    def base_model(self) -> str:
        """Return the MODEL that contributors start from now: the last promoted fused model, else the pretrained one."""
        return next(iter(self.bases.values()))


def is_run(path: Location) -> bool:
    """Return True if a directory is a RUN."""
    return (path / layout.RUN).is_file()


def _begun(folder: Location, number: int, own: Collection[str]) -> list[Location]:
    """Return the outputs of an iteration that exist, complete or unfinished; of contributions those named in `own`."""
    contributions = layout.contributions(folder, number)
    outputs = [
        *(contributions / name for name in sorted(own)),
        layout.fused(folder, number),
        layout.evaluation(folder, number),
    ]
    return [place for output in outputs for place in (output, layout.partial(output)) if place.exists()]


def read(folder: Location) -> Run:
    """Read `folder/run.json`. Raises ManifestError."""
    path = folder / layout.RUN
    version = conditional_write.read(path)
    if version is None:
        raise ManifestError(f"{folder} is not a run (it has no {layout.RUN}): start one with `coldctl plan`")
    try:
        document = json_value(version.data)
    except ValueError as error:
        raise ManifestError(f"{path} is not readable JSON ({error}): restore it or start a new RUN") from None
    if mismatch := find_mismatch(document, RunFile):
        raise ManifestError(f"{path}: {mismatch}. Restore it or start a new RUN.")
    stored = msgspec.convert(document, RunFile)
    if not stored.base.isprintable():
        raise ManifestError(f"{path}: 'base' is not printable text. Restore it or start a new RUN.")
    if stored.schema > SCHEMA:
        raise ManifestError(f"{path} has schema {stored.schema}, newer than this program's: update coldctl")
    return Run(**vars(stored), folder=folder, version=version)


def write(run: Run) -> None:
    """Write `run.json`, if it still is as `run` was read from it. Raises OutputError if another command was quicker."""
    document = {stored.name: getattr(run, stored.name) for stored in fields(RunFile)}
    path, data = run.folder / layout.RUN, (json.dumps(document, indent=2, default=vars) + "\n").encode()
    is_written = (
        conditional_write.replace(path, data, run.version) if run.version else conditional_write.create(path, data)
    )
    if not is_written:
        raise OutputError(f"{path} was changed by another command at the same time: run the same command again")


def extended(run: Run, planned: Run, iterations: int, own: Collection[str]) -> Run:
    """Return an existing run with a target of `iterations` more, under the settings of `planned`.

    A target that is not met yet is kept, so that an interrupted command is finished and no iteration is added.
    `own` are the names of the suite's datasets: contributions that others have dropped begin no iteration.
    Raises ConfigError if the base changed, or the settings changed in the middle of an iteration.
    """
    if planned.pretrained != run.pretrained or planned.revision != run.revision:
        raise ConfigError(
            f"{run.folder} started from {run.base}, the config now says {planned.base}: give a new RUN, or restore `base`"
        )
    number = run.decided + 1
    begun = _begun(run.folder, number, own)
    settings = (planned.config_digest, planned.sample, planned.seed)
    if settings != (run.config_digest, run.sample, run.seed) and begun:
        raise ConfigError(
            f"the config changed in the middle of iteration {number} of {run.folder}: "
            f"restore it to finish that iteration, or remove {', '.join(map(str, begun))} to start it again"
        )
    target = run.target if run.decided < run.target else run.decided + iterations
    return replace(planned, iterations=run.iterations, target=target, version=run.version)
