"""`coldctl finetune`: one contribution, or one per seen dataset of a suite."""

import os
import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldctl.cli.boundary import boundary
from coldctl.cli.options import Base, Flags, Workers, suite_of
from coldctl.common.errors import ColdctlError, ConfigError, DeclinedError, OutputError
from coldctl.config.loading import resolve
from coldctl.config.settings import DatasetConfig, FinetuneConfig
from coldctl.storage.location import locate

if TYPE_CHECKING:
    from coldctl.cli.screen import Screen
    from coldctl.training.jobs import Job, LogOptions


@dataclass(frozen=True)
class Target:
    """Where contributions go, and under which name."""

    output: Annotated[str, typer.Option("--output", help="Output: the contribution; for a suite its folder; or a RUN.")]
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the contribution. [dim]default: the dataset's[/]")
    ] = None
    sign_key: Annotated[
        Path | None,
        typer.Option(
            "--sign-key",
            metavar="KEY.pem",
            help="Signing key: sign the contribution (OpenSSF model signing), also a complete one.",
        ),
    ] = None


@dataclass(frozen=True)
class Suite:
    """Which datasets of a suite are trained on."""

    suite: Annotated[
        Path | None, typer.Option("--suite", metavar="FILE.toml", help="Suite: one contribution per seen dataset.")
    ] = None
    sample: Annotated[
        int | None, typer.Option("--sample", min=0, help="Sample: contributors drawn from the suite; 0: all.")
    ] = None
    only: Annotated[str, typer.Option("--only", metavar="A,B", help="Only these datasets of the suite.")] = ""


@dataclass(frozen=True)
class Logs:
    """How a training is followed and kept safe."""

    log: Annotated[
        str | None,
        typer.Option("--log", metavar="jsonl|tensorboard|wandb", help="Log of the training. [dim]default: none[/]"),
    ] = None
    log_folder: Annotated[Path, typer.Option("--log-folder", help="Log folder: where --log writes.")] = Path(
        "coldctl-logs"
    )
    checkpoint_seconds: Annotated[
        float,
        typer.Option(
            "--checkpoint-seconds", min=0.0, help="Checkpoint interval in seconds, against interruptions of a training."
        ),
    ] = 60.0

    def options(self) -> "LogOptions":
        """Return them as the training takes them. Raises ConfigError."""
        from coldctl.training.jobs import LogOptions
        from coldctl.training.logs import check_kind

        if self.log is not None:
            check_kind(self.log)
        return LogOptions(self.log, str(self.log_folder), self.checkpoint_seconds)


def finetune(
    base: Base,
    target: Target,
    suite: Suite,
    columns: Annotated[Flags, DatasetConfig, "text", "text_pair", "label", "license"],
    flags: Annotated[Flags, FinetuneConfig],
    logs: Logs,
    common: Workers,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="Directory with train, validation, test files; a file; hf:NAME."),
    ] = None,
) -> None:
    """Make a contribution: train body and head on one dataset, or one contribution per seen dataset of a suite."""
    from coldctl.training import distributed

    rank = os.environ.get("RANK", "0")
    follows = rank.isdecimal() and rank != "0" and "WORLD_SIZE" in os.environ
    with boundary(common, mute=follows) as screen:
        from coldctl.commands import finetune as stage
        from coldctl.data.datasets import config_from_reference
        from coldctl.training.jobs import JobOptions, jobs_of_suite, single_job

        alone = distributed.find().size == 1
        if not alone and common.engine != "local":
            raise ConfigError(f"--engine {common.engine} does not go with torchrun: leave one of them out")
        engine = common.workers(threads=common.threads if alone else None, jobs=None if alone else 1)
        if (data is None) == (suite.suite is None):
            raise ConfigError("give either DATA or --suite FILE.toml: see coldctl finetune --help")
        suite_datasets, file = suite_of(suite.suite, common.config)
        settings = resolve(FinetuneConfig, file, {**flags, "seed": common.seed})
        options = JobOptions(common.overwrite, logs.options(), target.sign_key)
        model, output = base.model(), locate(target.output)
        if data is None:
            if target.name or columns:
                raise ConfigError(
                    "--name, --license, --text, --text-pair and --label go with DATA: a suite's file has its own"
                )
            only = [name for name in suite.only.split(",") if name]
            work = jobs_of_suite(suite_datasets, model, output, settings, options, sample=suite.sample, only=only)
        else:
            if suite.sample is not None or suite.only:
                raise ConfigError("--sample and --only go with --suite: DATA is one dataset")
            dataset = config_from_reference(data, DatasetConfig(**{"name": "", "path": data, **columns}))
            work = [single_job(dataset, model, output, settings, options, name=target.name)]
        with screen.progress() as progress, closing(engine):
            outcomes = stage.finetune_all(work, engine, progress, lambda done: progress.note(_line(done)))
            distributed.disband()
        _show(screen, work, outcomes)


def _show(screen: "Screen", work: "Sequence[Job]", outcomes: Sequence[Any]) -> None:
    """Show what was made. Raises the error of a single job; of several an error that lists those that failed."""
    done = [outcome.result for outcome in outcomes if outcome.result is not None]
    failed: list[tuple[str, ColdctlError]] = [
        (work[outcome.index].name, outcome.error) for outcome in outcomes if outcome.error is not None
    ]
    if failed and len(work) == 1:
        raise failed[0][1]
    screen.result(done[0] if len(work) == 1 else {"contributions": done, "failed": [name for name, _ in failed]})
    if failed:
        names = shlex.quote(",".join(name for name, _ in failed))
        screen.as_json = False  # its document is out already
        outputs_only = all(isinstance(error, OutputError) for _, error in failed)
        raise (OutputError if outputs_only else DeclinedError)(
            f"{len(failed)} of {len(work)} contributions failed: mend the cause and repeat just these with --only {names}",
            [f"{name}: {error.message.removeprefix(f'{name}: ')}" for name, error in failed],
        )


def _line(done: Any) -> str:
    metrics = done.manifest.get("metrics", {})
    scores = ", ".join(
        f"{split} {metric} {value:.1f}" for split, values in metrics.items() for metric, value in values.items()
    )
    if done.unchanged:
        what = "signed" if done.signed else "left alone"
        return f"{done.name}: complete already ({scores}), {what}: {done.path}"
    speed = f" {done.train_examples_per_second:.0f} examples/s;" if done.train_examples_per_second else ""
    return f"{done.name}: {scores}; {done.stopped};{speed} {done.seconds:.0f} s: {done.path}"
