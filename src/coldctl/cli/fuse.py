"""`coldctl fuse`."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from coldctl.cli.boundary import boundary
from coldctl.cli.options import Base, Distributed, Flags
from coldctl.config.settings import FuseConfig


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
        from coldctl.api.fuse import fuse as run
        from coldctl.api.tables import fuse_table

        with screen.progress() as progress:
            fused = run(
                contributions, output=output, old_base=old_base or (), without=without, seed=common.seed,
                progress=progress, **vars(base), **common.arguments(), **flags,
            )  # fmt: skip
        if fused.unchanged:
            screen.say(f"{output}: complete already, left alone")
        else:
            screen.show(fuse_table(fused.contributions))
            count = sum(record["status"] == "fused" for record in fused.contributions)
            screen.say(f"fused {count} contribution{'s' if count != 1 else ''}: {output}")
        screen.result(fused.manifest)
