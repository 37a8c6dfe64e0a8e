"""`coldctl.publish`."""

from pathlib import Path
from typing import Annotated

from coldctl.api.keywords import Common, Place, Settings, Target, with_keywords
from coldctl.api.objects import Publication
from coldctl.artifacts import model_ref
from coldctl.commands import publish as command
from coldctl.config.loading import read, resolve
from coldctl.config.settings import PublishConfig
from coldctl.storage.location import locate


@with_keywords
def publish(
    model: Place,
    *,
    target: Target,
    settings: Annotated[Settings, PublishConfig],
    options: Common,
    evaluation: Place | None = None,
    sign_key: Place | None = None,
    revision: str | None = None,
) -> Publication:
    """Turn a fused model into a repository that anyone can load, with a model card: here, in a store or on the Hub.

    `evaluation` is the directory that `evaluate` wrote; `sign_key` signs all files (OpenSSF model signing).

    Raises ConfigError without a licence, ManifestError for an evaluation of another model, CheckpointError if the written
    model does not give the source model's features, OutputError if the target cannot be written.
    """
    config = resolve(PublishConfig, read(options.file), settings)
    source = model_ref.resolve(str(model), revision)
    with options.listener() as progress:
        done = command.publish(
            source,
            command.target_of(
                str(target.to),
                progress,
                private=target.private,
                create_pr=target.create_pr,
            ),
            config,
            evaluation=locate(str(evaluation)) if evaluation else None,
            sign_key=Path(sign_key) if sign_key else None,
            overwrite=options.overwrite,
            dry_run=target.dry_run,
            progress=progress,
        )
    return Publication(done.place, done.manifest, done.unchanged, target.dry_run, done.files, done.seconds)
