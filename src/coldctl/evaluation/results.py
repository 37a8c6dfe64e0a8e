"""`results.json`: its types, reading and checking.

`results.schema.json` is generated from these types by `scripts/results_schema.py`.
"""

from typing import Annotated, Literal, NotRequired, TypedDict, cast

from msgspec import Meta

from coldctl.artifacts import layout
from coldctl.common.errors import ManifestError
from coldctl.common.parsing import JSON_LIMIT, find_mismatch, json_value
from coldctl.config.settings import Metric, Protocol
from coldctl.evaluation.scoring import Verdict
from coldctl.storage.location import Location

Digest = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$", max_length=71)]
CellName = Annotated[
    str, Meta(pattern="^[ -~]*$", max_length=71, description="The file in cells/ that holds the predictions.")
]
Count = Annotated[int, Meta(ge=1)]
Score = Annotated[float, Meta(ge=-100, le=100)]
Points = Annotated[float, Meta(ge=-200, le=200)]
Interval = Annotated[list[Points], Meta(min_length=2, max_length=2)]
MaybeVerdict = Annotated[Verdict | None, Meta(description="null where one finetuning seed cannot tell.")]


class ModelEntry(TypedDict):
    """A model that was measured."""

    name: str
    body_digest: Digest
    run: NotRequired[Annotated[str | None, Meta(description="The RUN that made it, if one did.")]]
    iteration: NotRequired[Count | None]


class SeedEntry(TypedDict):
    """The scores of one seed, and the files that hold the predictions."""

    seed: Annotated[int, Meta(ge=0)]
    score: Score
    baseline_score: Score
    cell: CellName
    baseline_cell: CellName


class GainEntry(TypedDict):
    """What a model gains over the baseline under one protocol."""

    model: str
    protocol: Protocol
    mean: Score
    baseline_mean: Score
    gain: Points
    gain_interval: Interval
    verdict: MaybeVerdict


class ResultEntry(GainEntry):
    """One model on one dataset under one protocol."""

    dataset: str
    role: Literal["seen", "unseen"]
    metric: Metric
    num_test: Count
    seeds: Annotated[list[SeedEntry], Meta(min_length=1)]
    std: Annotated[Annotated[float, Meta(ge=0, le=200)] | None, Meta(description="Over seeds; null for a single one.")]


class AverageEntry(GainEntry):
    """The mean over a group of datasets; datasets count equally and are fixed."""

    group: Literal["all", "seen", "unseen"]


class OverlapEntry(TypedDict):
    """Test examples that are also in the training split of a dataset of the suite, the same or another."""

    test_of: str
    train_of: str
    examples: Count
    num_test: Count


class Results(TypedDict):
    """Scores are percent, gains are points, intervals are 95 %.

    Readers ignore unknown keys. A key may be added without a new schema number; none is removed or changes its meaning.
    """

    schema: Literal[1]
    baseline: ModelEntry
    models: Annotated[list[ModelEntry], Meta(min_length=1)]
    fingerprints: Annotated[
        dict[str, Digest],
        Meta(description="By dataset: sha256 over its class names and every example that was used."),
    ]
    results: Annotated[list[ResultEntry], Meta(description="One entry per model, dataset and protocol.")]
    averages: Annotated[list[AverageEntry], Meta(description="One entry per model, protocol and group of datasets.")]
    overlaps: list[OverlapEntry]


def read(folder: Location) -> Results:
    """Read the `results.json` of an evaluation's directory. Raises ManifestError."""
    path = folder / layout.RESULTS
    remedy = "make the evaluation again"
    try:
        with path.open("rb") as file:
            document = json_value(file.read(JSON_LIMIT + 1))
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}: {remedy}") from None
    except ValueError as error:
        raise ManifestError(f"{path} is not readable JSON ({error}): {remedy}") from None
    problem = find_mismatch(document, Results) or _incomplete(document)
    if problem is not None:
        raise ManifestError(f"{path}: {problem}. {remedy.capitalize()}.")
    return cast(Results, document)


def _incomplete(document: Results) -> str | None:
    """Return the entry whose model or dataset is not listed, or whose average is missing."""
    models = {model["name"] for model in document["models"]}
    averages = {(entry["model"], entry["protocol"]) for entry in document["averages"] if entry["group"] == "all"}
    for index, entry in enumerate(document["results"]):
        if entry["model"] not in models or entry["dataset"] not in document["fingerprints"]:
            return f"results[{index}] is of a model or dataset that is not listed"
        if (entry["model"], entry["protocol"]) not in averages:
            return f"results[{index}] has no average over all datasets"
    return None
