"""`results.json` read back: what an evaluation found, perhaps somebody else's, with everything that reports rely on."""

import math
import typing
from types import NoneType
from typing import Any

from coldctl.artifacts import layout
from coldctl.common.errors import ManifestError
from coldctl.common.parsing import JSON_LIMIT, MAYBE_TEXT, Shape, json_value, misfit
from coldctl.config.settings import PROTOCOLS, Metric
from coldctl.storage.location import Location

_METRICS = typing.get_args(Metric)
_DIGEST_LENGTH = 71  # of sha256:…


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _digest(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _DIGEST_LENGTH


def _one_of(*words: str | None) -> Any:
    return lambda value: isinstance(value, str | None) and value in words


def _interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


_GAIN: Shape = {
    "model!": str, "protocol!": _one_of(*PROTOCOLS), "mean!": _number, "baseline_mean!": _number, "gain!": _number,
    "gain_interval!": _interval, "verdict!": _one_of("better", "worse", "indistinguishable", None),
}  # fmt: skip
_SEED: Shape = {
    "seed!": int, "score!": _number, "baseline_score!": _number, "cell!": _digest, "baseline_cell!": _digest
}  # fmt: skip
_SHAPE: Shape = {
    "schema!": int,
    "baseline!": {"name!": str, "body_digest!": _digest},
    "models!": [{"name!": str, "body_digest!": _digest, "run": MAYBE_TEXT, "iteration": (int, NoneType)}],
    "fingerprints!": {...: _digest},
    "results!": [{
        **_GAIN, "dataset!": str, "role!": _one_of("seen", "unseen"), "metric!": _one_of(*_METRICS), "num_test!": int,
        "seeds!": [_SEED], "std!": lambda value: value is None or _number(value),
    }],
    "averages!": [{**_GAIN, "group!": _one_of("all", "seen", "unseen")}],
    "overlaps!": [{"test_of!": str, "train_of!": str, "examples!": int, "num_test!": int}],
}  # fmt: skip


def read(folder: Location) -> dict[str, Any]:
    """The `results.json` of an evaluation's directory. Raises ManifestError if it is none."""
    path = folder / layout.RESULTS
    remedy = "make the evaluation again"
    try:
        with path.open("rb") as file:
            document = json_value(file.read(JSON_LIMIT + 1))
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}: {remedy}") from None
    except ValueError as error:
        raise ManifestError(f"{path} is not readable JSON ({error}): {remedy}") from None
    place = misfit(document, _SHAPE) or _without_place(document)
    if place is not None:
        raise ManifestError(f"{path}: {place!r} is missing or not what it should be: {remedy}")
    found: dict[str, Any] = document
    return found


def _without_place(document: dict[str, Any]) -> str | None:
    """An entry about a model or dataset that is not listed, or an average that is missing."""
    models = {model["name"] for model in document["models"]}
    averages = {(entry["model"], entry["protocol"]) for entry in document["averages"] if entry["group"] == "all"}
    for index, entry in enumerate(document["results"]):
        if entry["model"] not in models or entry["dataset"] not in document["fingerprints"]:
            return f"results[{index}]"
        if (entry["model"], entry["protocol"]) not in averages:
            return "averages"
    return None
