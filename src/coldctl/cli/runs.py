"""`coldctl plan`, `promote`, `status` and `watch`."""

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldctl.artifacts import layout
from coldctl.cli.boundary import boundary
from coldctl.cli.options import Common, Flags, Workers
from coldctl.common.errors import ConfigError
from coldctl.config.loading import located, read, read_suite, resolve
from coldctl.config.settings import EvaluateConfig, FinetuneConfig, FuseConfig, RunConfig
from coldctl.config.values import seconds_in
from coldctl.storage.location import locate

if TYPE_CHECKING:
    from coldctl.cli.screen import Screen

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run: its directory.")]
# What commands that draw nothing and run no jobs hide.
Plain = Annotated[Common, "seed", "jobs", "engine", "config", "overwrite"]


def status(
    run: RunArgument,
    common: Plain,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Pretrained model: only print where iteration 1 starts, for scripts.")
    ] = False,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Evaluation: only print where the base model's is, for scripts.")
    ] = False,
) -> None:
    """Show a run's iterations: what is complete, missing, running."""
    with boundary(common) as screen:
        from coldctl.api.tables import status_table
        from coldctl.commands import status as stage

        current = stage.status(locate(run))
        if evaluation and current.evaluation is None:
            raise ConfigError(f"{run} has no evaluation of a promoted model yet: run `make iterate` first")
        if (pretrained or evaluation) and not common.as_json:
            sys.stdout.write(f"{current.pretrained if pretrained else current.evaluation}\n")
            return
        screen.show(status_table(current))
        if current.waiting:
            screen.say(f"late, waiting for the next fuse: {', '.join(current.waiting)}")
        screen.result(current)


def plan(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run: its directory, made if it is missing.")],
    flags: Annotated[Flags, RunConfig],
    common: Annotated[Common, "jobs", "engine", "overwrite"],
    iterations: Annotated[
        int, typer.Option("--iterations", min=0, help="Iterations to add; an unmet target is finished first.")
    ] = 1,
    target: Annotated[
        int | None, typer.Option("--target", min=0, help="Target: iterations in all, in place of --iterations.")
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Gate: promote a fused model only if it is no regression.")
    ] = False,
) -> None:
    """Start or extend a run, and print the numbers of the iterations still to be made."""
    with boundary(common) as screen:
        from coldctl.commands import plan as stage

        if common.config is None:
            raise ConfigError("give --config FILE.toml: it names the suite and the settings of the run")
        file = read(common.config)
        base = {"base": located(flags["base"], Path())} if "base" in flags else {}
        settings = resolve(RunConfig, file, {**flags, **base})
        with screen.progress() as progress:
            numbers = stage.plan(
                locate(run),
                file,
                settings,
                iterations=iterations,
                seed=common.seed or 0,
                gate=gate,
                target=target,
                progress=progress,
            )
        if common.as_json:
            screen.result({"run": str(run), "iterations": numbers})
        else:
            sys.stdout.write("".join(f"{number:03d}\n" for number in numbers))


def promote(run: RunArgument, common: Plain) -> None:
    """Decide about the newest fused model of a run: it becomes the base, unless the gate says no."""
    with boundary(common) as screen:
        from coldctl.commands import plan as stage

        folder = locate(run)
        decision = stage.promote(folder)
        where = layout.fused(folder, decision.number)
        if decision.promoted:
            screen.say(f"iteration {decision.number} is promoted: the next base model is {where}")
        else:
            screen.say(f"iteration {decision.number} is not promoted, the base model stays: {decision.reason}")
        screen.result(decision)


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run: its directory, made by `coldctl plan`.")],
    common: Annotated[Workers, "overwrite"],
    min_contributions: Annotated[
        int | None,
        typer.Option(
            "--min-contributions", min=1, metavar="N", help="Smallest number of usable contributions per iteration."
        ),
    ] = None,
    every: Annotated[
        str, typer.Option("--every", metavar="TIME", help="Interval between looks: 30s, 10m, 2h.")
    ] = "10m",
    suite: Annotated[
        Path | None,
        typer.Option("--suite", metavar="FILE.toml", help="Suite: the datasets to measure on, and the settings."),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations", min=1, metavar="K", help="Iterations to make before it ends. [dim]default: go on[/]"
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Once: look one time, do what can be done, end; for cron.")] = (
        False
    ),
) -> None:
    """Fuse whenever enough contributions have come to a run, evaluate, promote, and wait for the next ones."""
    with boundary(common) as screen:
        from coldctl import workers
        from coldctl.commands import watch as watching

        datasets, file = read_suite(suite, common.config) if suite else ((), read(common.config))
        # Strangers may write to what is watched: unless the file says otherwise, what is bad is dropped and stops nobody.
        screening = None if "screen" in file.sections.get("fuse", {}) else "reject"
        seed = {"seed": common.seed}
        fusing = resolve(FuseConfig, file, {"min_contributions": min_contributions, "screen": screening, **seed})
        if not fusing.min_contributions:
            raise ConfigError("how many contributions does an iteration need? Give --min-contributions N")
        settings = watching.Settings(
            fusing,
            resolve(EvaluateConfig, file, seed),
            resolve(FinetuneConfig, file, seed),
            datasets or file.datasets,
            workers.choose(common.engine, jobs=common.jobs, threads=common.threads, ray_address=common.ray_address),
        )
        with screen.progress() as progress, closing(settings.engine):
            looks = watching.watch(
                locate(run),
                settings,
                every=seconds_in(every),
                iterations=iterations,
                once=once,
                progress=progress,
                announce=lambda look: _announce(screen, look, fusing.min_contributions),
            )
        screen.result({"run": run, "looks": looks})


def _announce(screen: "Screen", look: Any, least: int) -> None:
    """Show one look of `watch` in words, and in tables where there is something to show."""
    from coldctl.api.tables import evaluation_tables, fuse_table

    if look.state == "waiting":
        screen.say(f"iteration {look.iteration}: {look.usable} of {least} contributions have come, waiting")
    elif look.state != "decided":
        screen.say(f"iteration {look.iteration}: {look.reason}; waiting")
    else:
        screen.show(fuse_table(look.fused["contributions"]), *(evaluation_tables(look.results) if look.results else ()))
        promoted = "promoted" if look.promoted else f"not promoted, the base model stays: {look.reason}"
        screen.say(f"iteration {look.iteration} is fused and {promoted}")
