"""`coldctl fuse`: contributions become a fused model, or one is withdrawn from it."""

from collections.abc import Sequence
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from coldctl.cli.boundary import boundary
from coldctl.cli.options import Base, Distributed, Flags
from coldctl.common.errors import ConfigError
from coldctl.config.loading import read, resolve
from coldctl.config.settings import FuseConfig
from coldctl.storage.location import locate


class FuseCommand(TyperCommand):
    """The command with a help that ends with the registered merge methods. They are imported when help is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text."""
        from coldctl.fusing.methods import method_table

        rows = [f"[bold]{escape(name)}[/]: {escape(summary)}" for name, summary, _ in method_table()]
        self.epilog = "\n\n".join(["Merge methods (--method):", *rows, self.epilog or ""])
        super().format_help(ctx, formatter)


def fuse(
    contributions: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT_OR_FOLDER...", help="Contributions to fuse.")
    ],
    base: Base,
    output: Annotated[str, typer.Option("--output", help="Output: directory of the fused model.")],
    flags: Annotated[Flags, FuseConfig],
    common: Distributed,
    old_base: Annotated[
        list[str] | None,
        typer.Option(
            "--old-base", metavar="MODEL", help="Old base: where an earlier base is, outside of a RUN; repeatable."
        ),
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(
            "--without", metavar="NAME", help="Withdraw the contribution NAME from the fused model given first."
        ),
    ] = None,
) -> None:
    """Average the bodies of contributions into a better base model."""
    with boundary(common) as screen:
        from coldctl.artifacts import model_ref
        from coldctl.commands import fuse as stage

        engine = common.workers(threads=1)
        file = read(common.config)
        if "scale" in flags and "outer_lr" in flags:
            raise ConfigError("--scale and --outer-lr exclude each other: give one of them")
        settings = resolve(FuseConfig, file, {**flags, "seed": common.seed})
        model, place = base.model(), locate(output)
        with screen.progress() as progress, closing(engine):
            more: dict[str, Any] = {
                "overwrite": common.overwrite, "progress": progress, "old_bases": old_base or (), "engine": engine,
            }  # fmt: skip
            if without is not None:
                fused = model_ref.resolve(contributions[0])
                done = stage.withdraw(
                    stage.Withdrawal(fused, without, contributions[1:]), model, place, settings, **more
                )
            else:
                done = stage.fuse(contributions, model, place, settings, **more)
        if done.unchanged:
            screen.say(f"{output}: complete already, left alone")
        else:
            from coldctl.cli.tables import fuse_table

            records: Sequence[Any] = done.manifest["contributions"]
            screen.show(fuse_table(records))
            count = sum(record["status"] == "fused" for record in records)
            screen.say(f"fused {count} contribution{'s' if count != 1 else ''}: {output}")
        screen.result(done.manifest)
