"""`coldctl publish`: a fused model becomes a repository."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from coldctl.cli.boundary import boundary
from coldctl.cli.options import Common, Flags, Revision
from coldctl.config.loading import read, resolve
from coldctl.config.settings import PublishConfig
from coldctl.storage.location import locate


@dataclass(frozen=True)
class Sending:
    """Where a model is published, and how."""

    to: Annotated[str, typer.Option("--to", metavar="DIR|URL|hf://ORG/NAME", help="Target: where to publish it.")]
    private: Annotated[bool, typer.Option("--private", help="Private: on the Hub, make a new repository private.")] = (
        False
    )
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Pull request: on the Hub, open one.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Dry run: list what would be sent, and send nothing.")] = (
        False
    )


def publish(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Fused model to publish.")],
    sending: Sending,
    flags: Annotated[Flags, PublishConfig],
    common: Annotated[Common, "seed", "jobs", "engine"],
    evaluation: Annotated[
        str | None, typer.Option("--evaluation", help="Evaluation: directory that `coldctl evaluate` wrote.")
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option("--sign-key", metavar="KEY.pem", help="Signing key: sign all files (OpenSSF model signing)."),
    ] = None,
    revision: Revision = None,
) -> None:
    """Turn a fused model into a repository that anyone can load, with a model card: here, in a store or on the Hub."""
    with boundary(common) as screen:
        from coldctl.artifacts import model_ref
        from coldctl.cli.tables import files_table
        from coldctl.commands import publish as stage

        settings = resolve(PublishConfig, read(common.config), flags)
        source = model_ref.resolve(model, revision)
        with screen.progress() as progress:
            target = stage.target_of(sending.to, progress, private=sending.private, create_pr=sending.create_pr)
            done = stage.publish(
                source,
                target,
                settings,
                evaluation=locate(evaluation) if evaluation else None,
                sign_key=sign_key,
                overwrite=common.overwrite,
                dry_run=sending.dry_run,
                progress=progress,
            )
        if done.unchanged:
            screen.say(f"{done.place}: complete already, left alone")
        elif sending.dry_run:
            screen.show(files_table(done.files))
            screen.say(f"{done.place}: nothing was sent; {len(done.files)} files would be")
        else:
            screen.say(f"{done.place}: published, loaded and compared")
        how = {"place": done.place, "unchanged": done.unchanged, "dry_run": sending.dry_run}
        screen.result({**done.manifest, **how, "sizes": done.files, "seconds": done.seconds})
