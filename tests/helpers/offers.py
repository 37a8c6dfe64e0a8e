"""Contributions without training: a base with noise and a manifest, for tests that need many of them, or many iterations."""

from pathlib import Path

from coldctl.artifacts import layout, manifest
from coldctl.checkpoints.checkpoint import open_checkpoint
from coldctl.checkpoints.digests import body_digest, outside_body
from coldctl.storage.local import LocalFolder
from helpers import tiny


def offer(base: Path, folder: Path, *, seed: int, scale: float = 0.01, iteration: int | None = None) -> Path:
    """Write a contribution made on `base`: its body with noise of this scale, and a manifest that says so."""
    tiny.perturb(base, folder, seed=seed, scale=scale)
    (folder / layout.MANIFEST).unlink(missing_ok=True)
    before = open_checkpoint(LocalFolder(base), base.name)
    made = open_checkpoint(LocalFolder(folder), folder.name)
    number = (before.manifest.get("iteration") if before.manifest else None) or 0
    manifest.write(
        folder,
        {
            "kind": "contribution",
            "name": folder.name,
            "iteration": iteration or number + 1,
            "encoding": "full",
            "body_digest": body_digest(made),
            "outside_body": outside_body(made),
            "base": {"name": base.name, "body_digest": body_digest(before)},
            "license": "mit",
            "dataset": {"name": folder.name, "num_train": 100 + seed, "labels": ["a", "b"]},
        },
    )
    return folder
