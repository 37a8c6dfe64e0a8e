"""`coldctl.check`, `coldctl.lineage` and `coldctl.carriers`."""

from collections.abc import Sequence
from pathlib import Path

from coldctl.api.keywords import Place, Quiet, as_list, with_keywords
from coldctl.api.objects import CheckReport, Lineage
from coldctl.artifacts import model_ref
from coldctl.commands import check as check_command
from coldctl.commands import lineage as lineage_command
from coldctl.commands.lineage import Carrier


@with_keywords
def check(
    checkpoints: Place | Sequence[Place],
    *,
    options: Quiet,
    base: Place | None = None,
    revision: str | None = None,
    deep: bool = False,
    verify_key: Place | None = None,
    trusted_keys: Place | None = None,
) -> CheckReport:
    """Say whether checkpoints would fuse, from their headers alone, in milliseconds.

    `base` is the model that they should fit. `deep` reads all data and verifies digests. `verify_key` is a public key's
    file and `trusted_keys` a directory of them: signatures are verified by these.

    Raises ModelError if there are no checkpoints, ConfigError if a key cannot be read.
    """
    model = model_ref.resolve(str(base), revision) if base else None
    with options.listener() as progress:
        report = check_command.check(
            as_list(checkpoints), model, deep=deep, progress=progress,
            verify_key=Path(verify_key) if verify_key else None,
            trusted_keys=Path(trusted_keys) if trusted_keys else None,
        )  # fmt: skip
    return CheckReport(report.checked, report.not_examined)


def lineage(model: Place) -> Lineage:
    """Return where a model came from: pretrained model, iterations, contributions. Raises ManifestError or ModelError."""
    return Lineage(tuple(lineage_command.lineage(model_ref.resolve(str(model)))))


def carriers(models: Place | Sequence[Place], signer: Place) -> list[Carrier]:
    """Return which contributions signed by `signer` each model carries; a RUN means all its iterations.

    `signer` is a public key's file or the name that it was trusted under. Raises ManifestError or ConfigError.
    """
    return lineage_command.carriers(as_list(models), str(signer))
