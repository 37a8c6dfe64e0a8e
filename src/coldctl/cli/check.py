"""`coldctl check` and `coldctl lineage`."""

from pathlib import Path
from typing import Annotated

import typer

from coldctl.cli.boundary import boundary
from coldctl.cli.options import Common, Revision
from coldctl.common.errors import ConfigError, DeclinedError


def check(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT_OR_FOLDER...", help="Checkpoints to examine.")
    ],
    common: Annotated[Common, "seed", "jobs", "engine", "config", "overwrite"],
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Base model they should fit.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Deep check: read all data and verify digests.")] = False,
    verify_key: Annotated[
        Path | None,
        typer.Option("--verify-key", metavar="KEY.pem", help="Public key: verify signatures by this one."),
    ] = None,
    trusted_keys: Annotated[
        Path | None,
        typer.Option(
            "--trusted-keys",
            metavar="DIR",
            help="Public keys: verify signatures by any of DIR/NAME.pem, naming it.",
        ),
    ] = None,
    revision: Revision = None,
) -> None:
    """Say whether checkpoints would fuse, from their headers alone, in milliseconds."""
    with boundary(common) as screen:
        from coldctl.api.check import check as run
        from coldctl.api.tables import check_table

        with screen.progress() as progress:
            report = run(
                checkpoints, base=base, revision=revision, deep=deep, verify_key=verify_key, trusted_keys=trusted_keys,
                progress=progress,
            )  # fmt: skip
        screen.show(check_table(report))
        screen.say(f"not examined: {'; '.join(report.not_examined)}")
        screen.result({"sound": report.sound, "checked": report.checked, "not_examined": report.not_examined})
        if not report.sound:
            raise typer.Exit(DeclinedError.exit_code)


def lineage(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="A fused or published model, or a contribution.")
    ],
    common: Annotated[Common, "seed", "jobs", "engine", "config", "overwrite"],
    signer: Annotated[
        str | None,
        typer.Option(
            "--signer",
            metavar="NAME|KEY.pem",
            help="Signer: which of these models (of a RUN: all) carry contributions signed by this key; 3 if any does.",
        ),
    ] = None,
) -> None:
    """Show where a model came from: pretrained model, iterations, contributions accepted and refused."""
    with boundary(common) as screen:
        from coldctl.api import check as api
        from coldctl.api.tables import carriers_table, lineage_tree
        from coldctl.commands.lineage import in_words

        if signer is not None:
            carriers = api.carriers(models, signer)
            screen.show(carriers_table(carriers))
            screen.result({"signer": signer, "models": carriers})
            if tainted := [model for model in carriers if model.carried]:
                screen.as_json = False  # its document is out already
                raise DeclinedError(
                    f"{len(tainted)} of {len(carriers)} models carry contributions signed by {signer}: fuse without "
                    "them, or go on from a model that carries none",
                    [f"{model.place}: {in_words(model)}" for model in tainted],
                )
            screen.say(f"none of {len(carriers)} models carries a contribution signed by {signer}")
            return
        if len(models) > 1:
            raise ConfigError("the lineage of one MODEL is shown at a time: give one, or --signer to search several")
        ancestry = api.lineage(models[0])
        screen.show(lineage_tree(ancestry.generations))
        screen.result({"lineage": ancestry.generations})
