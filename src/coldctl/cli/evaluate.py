"""`coldctl evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from coldctl.cli.boundary import boundary
from coldctl.cli.options import Flags, Revision, Workers
from coldctl.common.errors import DeclinedError
from coldctl.config.settings import EvaluateConfig


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models to measure; a RUN means all its iterations.")
    ],
    suite: Annotated[
        Path, typer.Option("--suite", metavar="FILE.toml", help="Suite: the datasets to measure on, and settings.")
    ],
    output: Annotated[str, typer.Option("--output", help="Output: directory of the evaluation.")],
    flags: Annotated[Flags, EvaluateConfig],
    common: Workers,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="Baseline that gains are measured against. [dim]default: the base that the manifest names[/]",
        ),
    ] = None,
    fail_on_regression: Annotated[
        bool,
        typer.Option(
            "--fail-on-regression", help="Regression check: end with 3 if the average gain is surely negative."
        ),
    ] = False,
    revision: Revision = None,
) -> None:
    """Measure whether models are better base models than a baseline, with intervals, on a suite of datasets."""
    with boundary(common) as screen:
        from coldctl.api.evaluate import evaluate as run
        from coldctl.api.tables import evaluation_tables

        with screen.progress() as progress:
            done = run(
                models, suite=suite, output=output, baseline=baseline, revision=revision, seed=common.seed,
                progress=progress, **common.arguments(), **flags,
            )  # fmt: skip
        screen.show(*evaluation_tables(done.results))
        screen.say(f"{'complete already, left alone' if done.unchanged else 'written'}: {output}")
        screen.result(done.results)
        if fail_on_regression and (losses := done.regressions()):
            screen.as_json = False  # its document is out already
            raise DeclinedError("the average gain is negative beyond doubt", losses)
