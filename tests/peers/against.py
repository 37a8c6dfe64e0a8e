"""What the tests against other tools share: sibling checkpoints of one base, the fused body, and how close is equal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conftest import Ran, run_coldctl
from helpers import tiny

Body = dict[str, NDArray[np.float64]]  # tensors by name without the body's prefix, widened to float64

HEADS = ("classifier.", "pre_classifier.", "score.")


@dataclass(frozen=True)
class Siblings:
    """A base model and its contributions, each with a classification head, as they lie on disk."""

    base: Path
    contributions: tuple[Path, ...]

    @property
    def names(self) -> list[str]:
        return [path.name for path in self.contributions]


def make_siblings(
    folder: Path, count: int, *, dtype: str = "float32", shared: float = 0.01, own: float = 0.01
) -> Siblings:
    """Make a tiny RoBERTa with a head and `count` perturbed copies of it.

    All copies are moved by the same noise of scale `shared` and each by its own of scale `own`, so that the
    differences from the base have something in common (a mean cosine of about 1/2 where the scales are equal).
    """
    base = tiny.make_base("roberta", folder / "base", head="sequence", dtype=dtype)
    moved = tiny.perturb(base, folder / "moved", seed=1000, scale=shared)
    return Siblings(
        base,
        tuple(tiny.perturb(moved, folder / f"number-{seed}", seed=seed, scale=own) for seed in range(count)),
    )


def read_body(folder: Path) -> Body:
    """The floating tensors of a checkpoint's body, of any floating dtype, whoever wrote it."""
    tensors: Body = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in tiny.read_tensors(file)[0].items():
            if tensor.is_floating_point() and not name.startswith(HEADS):
                tensors[name.removeprefix("roberta.")] = tensor.double().numpy()
    return tensors


def fuse(output: Path, siblings: Siblings, *options: object) -> tuple[Body, Any]:
    """Fuse through the command line. Returns the fused body, and what `--json` printed."""
    ran: Ran = run_coldctl(
        "fuse",
        *siblings.contributions,
        "--base",
        siblings.base,
        "--output",
        output,
        "--screen",
        "off",
        "--json",
        *options,
    )
    assert ran.code == 0, ran.stderr
    return read_body(output), ran.json


def write_weights(file: Path, weights: Mapping[str, float]) -> Path:
    """A file for `--weights`: contributions' names and their weights."""
    file.write_text(json.dumps(weights))
    return file


def assert_equal(actual: Body, expected: Body, inputs: Sequence[Body], *, epsilons: float = 4) -> None:
    """Equal within the rounding of float32: so many times its machine epsilon, relative to the tensor's largest input."""
    assert set(actual) == set(expected)
    for name, values in expected.items():
        largest = max(float(np.abs(body[name]).max()) for body in inputs)
        allowed = epsilons * float(np.finfo(np.float32).eps) * largest
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=allowed, err_msg=name)
