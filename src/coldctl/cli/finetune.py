"""`coldctl finetune`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldctl.cli.boundary import boundary
from coldctl.cli.options import Base, Flags, Workers
from coldctl.common.errors import ConfigError
from coldctl.config.settings import DatasetConfig, FinetuneConfig

if TYPE_CHECKING:
    from coldctl.api.objects import Contribution


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
    rank = os.environ.get("RANK", "0")
    follows = rank.isdecimal() and rank != "0" and "WORLD_SIZE" in os.environ
    with boundary(common, mute=follows) as screen:
        from coldctl.api import finetune as api
        from coldctl.api.objects import SuiteError

        if (data is None) == (suite.suite is None):
            raise ConfigError("give either DATA or --suite FILE.toml: see coldctl finetune --help")
        if data is None and (target.name or columns):
            raise ConfigError(
                "--name, --license, --text, --text-pair and --label go with DATA: a suite's file has its own"
            )
        if data is not None and (suite.sample is not None or suite.only):
            raise ConfigError("--sample and --only go with --suite: DATA is one dataset")
        keywords = {
            "output": target.output, "sign_key": target.sign_key, "seed": common.seed,
            **vars(base), **vars(logs), **common.arguments(), **flags,
        }  # fmt: skip
        with screen.progress() as progress:
            if data is not None:
                made = api.finetune(data, name=target.name, progress=progress, **columns, **keywords)
                screen.result(_record(made))
                return
            only = [name for name in suite.only.split(",") if name]
            try:
                several = api.finetune_suite(suite.suite, sample=suite.sample, only=only, progress=progress, **keywords)
            except SuiteError as error:
                screen.result({"contributions": list(map(_record, error.contributions)), "failed": list(error.failed)})
                screen.as_json = False  # its document is out already
                raise
        if len(several) == 1:
            screen.result(_record(several[0]))
        else:
            screen.result({"contributions": list(map(_record, several)), "failed": []})


def _record(made: "Contribution") -> dict[str, Any]:
    return {**vars(made), "path": str(made.path)}
