"""`coldctl evaluate`: models are measured against a baseline."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from coldctl.cli.boundary import boundary
from coldctl.cli.options import Flags, Revision, Workers, suite_of
from coldctl.common.errors import DeclinedError
from coldctl.config.loading import resolve
from coldctl.config.settings import EvaluateConfig, FinetuneConfig
from coldctl.storage.location import locate


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
        from coldctl.cli.tables import evaluation_tables
        from coldctl.commands import evaluate as stage
        from coldctl.evaluation import scoring
        from coldctl.evaluation.measure import Suite

        engine = common.workers(threads=common.threads)
        datasets, file = suite_of(suite, common.config)
        settings = resolve(EvaluateConfig, file, {**flags, "seed": common.seed})
        finetuning = resolve(FinetuneConfig, file, {"seed": common.seed})
        with screen.progress() as progress, closing(engine):
            done = stage.evaluate(
                models, baseline, Suite(datasets, settings, finetuning), locate(output),
                revision=revision, engine=engine, overwrite=common.overwrite, progress=progress,
            )  # fmt: skip
        screen.show(*evaluation_tables(done.results))
        screen.say(f"{'complete already, left alone' if done.unchanged else 'written'}: {output}")
        screen.result(done.results)
        if fail_on_regression and (losses := scoring.regressions(done.results, settings.regression_margin)):
            screen.as_json = False  # its document is out already
            raise DeclinedError("the average gain is negative beyond doubt", losses)
