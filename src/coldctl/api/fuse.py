"""`coldctl.fuse`."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, cast

from coldctl.api.keywords import Base, Distributed, Place, Settings, as_list, with_keywords
from coldctl.api.objects import FusedModel
from coldctl.artifacts import model_ref
from coldctl.commands import fuse as command
from coldctl.common.errors import ConfigError
from coldctl.config.loading import read, resolve
from coldctl.config.settings import FuseConfig
from coldctl.storage.location import locate


@with_keywords
def fuse(
    contributions: Place | Sequence[Place],
    *,
    base: Base,
    output: Place,
    settings: Annotated[Settings, FuseConfig],
    options: Distributed,
    old_base: Sequence[Place] = (),
    without: str | None = None,
) -> FusedModel:
    """Average the bodies of contributions into a better base model and write it to `output`.

    `contributions` are checkpoints or folders of them. `old_base` names earlier bases outside of a RUN. `without`
    withdraws the contribution of that name from the fused model given first.

    Raises CheckpointError if an input cannot be fused, DeclinedError if `strict` forbids to leave one out, ConfigError,
    ModelError or OutputError.
    """
    engine = options.workers(threads=1)
    if "scale" in settings and "outer_lr" in settings:
        raise ConfigError("--scale and --outer-lr exclude each other: give one of them")
    config = resolve(FuseConfig, read(options.file), settings)
    model, place = base.model(), locate(str(output))
    references = as_list(contributions)
    with options.listener() as progress, closing(engine):
        more: dict[str, Any] = {
            "overwrite": options.overwrite, "progress": progress, "old_bases": as_list(old_base), "engine": engine,
        }  # fmt: skip
        if without is None:
            done = command.fuse(references, model, place, config, **more)
        else:
            withdrawal = command.Withdrawal(model_ref.resolve(references[0]), without, references[1:])
            done = command.withdraw(withdrawal, model, place, config, **more)
    return FusedModel(cast(Path, done.path), done.manifest, done.unchanged)
