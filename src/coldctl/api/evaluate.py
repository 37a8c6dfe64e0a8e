"""`coldctl.evaluate` and `coldctl.load_results`."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, cast

from coldctl.api.keywords import Place, Settings, Workers, as_list, with_keywords
from coldctl.api.objects import Evaluation
from coldctl.artifacts import manifest
from coldctl.commands import evaluate as command
from coldctl.config.loading import read_suite, resolve
from coldctl.config.settings import EvaluateConfig, FinetuneConfig
from coldctl.evaluation import results
from coldctl.evaluation.measure import Suite
from coldctl.storage.location import locate


@with_keywords
def evaluate(
    models: Place | Sequence[Place],
    *,
    suite: Place,
    output: Place,
    settings: Annotated[Settings, EvaluateConfig],
    options: Workers,
    baseline: Place | None = None,
    revision: str | None = None,
) -> Evaluation:
    """Measure whether models are better base models than a baseline, on the datasets of a suite's TOML file.

    A RUN among `models` means all its iterations. The default `baseline` is the base that the first model's manifest
    names. `revision` is that of models on the Hub.

    Raises ConfigError, DataError, ModelError or OutputError.
    """
    engine = options.workers(threads=options.threads)
    datasets, file = read_suite(Path(suite), options.file)
    measured_on = Suite(
        datasets, resolve(EvaluateConfig, file, settings), resolve(FinetuneConfig, file, {"seed": settings.get("seed")})
    )
    with options.listener() as progress, closing(engine):
        done = command.evaluate(
            as_list(models), str(baseline) if baseline else None, measured_on, locate(str(output)),
            revision=revision, engine=engine, overwrite=options.overwrite, progress=progress,
        )  # fmt: skip
    return Evaluation(cast(Path, done.path), manifest.read(done.path), done.results, done.unchanged)


def load_results(path: Place) -> Evaluation:
    """Read an evaluation's directory, whose files must be as `evaluate` wrote them. Raises ManifestError."""
    folder = locate(str(path))
    return Evaluation(cast(Path, folder), manifest.read_unchanged(folder), results.read(folder))
