"""The robust merge methods against Flower's aggregation functions on the same files.

Flower aggregates lists of arrays, so each contribution's body is handed over in the order of its tensors' names.
These tests run in an environment that has flwr (`make test-peers`) and are skipped in all others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from against import Body, Siblings, assert_equal, fuse, make_siblings, read_body, write_weights

from helpers import tiny

aggregate: Any = pytest.importorskip("flwr.server.strategy.aggregate")

EXAMPLES = {"number-0": 100, "number-1": 3000, "number-2": 7, "number-3": 450, "number-4": 1200}


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    """Seven contributions, two of which went astray: the first a little, the fourth far."""
    folder = tmp_path_factory.mktemp("seven")
    siblings = make_siblings(folder, 7)
    astray = {0: 0.05, 3: 1.0}
    return Siblings(
        siblings.base,
        tuple(
            tiny.perturb(path, folder / f"astray-{number}", seed=50 + number, scale=astray[number])
            if number in astray
            else path
            for number, path in enumerate(siblings.contributions)
        ),
    )


def results(siblings: Siblings, examples: dict[str, int] | None = None) -> list[tuple[list[Any], int]]:
    """What Flower's server receives: each client's float32 arrays and its number of examples."""
    received = []
    for path in siblings.contributions:
        arrays = [values.astype(np.float32) for _, values in sorted(read_body(path).items())]
        received.append((arrays, (examples or {}).get(path.name, 1)))
    return received


def named(siblings: Siblings, arrays: Sequence[Any]) -> Body:
    names = sorted(read_body(siblings.base))
    return {name: np.asarray(values, np.float64) for name, values in zip(names, arrays, strict=True)}


def bodies(siblings: Siblings) -> list[Body]:
    return [read_body(path) for path in (siblings.base, *siblings.contributions)]


def only(siblings: Siblings, count: int) -> Siblings:
    return Siblings(siblings.base, siblings.contributions[:count])


def test_mean_is_fedavg(tmp_path: Path, seven: Siblings) -> None:
    ours, _ = fuse(tmp_path / "ours", seven, "--method", "mean")
    assert_equal(ours, named(seven, aggregate.aggregate(results(seven))), bodies(seven))


def test_weighted_mean_is_fedavg(tmp_path: Path) -> None:
    siblings = make_siblings(tmp_path / "siblings", 5)
    file = write_weights(tmp_path / "weights.json", EXAMPLES)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "mean", "--weights", file)
    assert_equal(ours, named(siblings, aggregate.aggregate(results(siblings, EXAMPLES))), bodies(siblings))


@pytest.mark.parametrize("count", [1, 2, 6, 7])
def test_median(count: int, tmp_path: Path, seven: Siblings) -> None:
    siblings = only(seven, count)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "median")
    theirs = named(siblings, aggregate.aggregate_median(results(siblings)))
    if count % 2:
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)
    assert_equal(ours, theirs, bodies(siblings), epsilons=1)


@pytest.mark.parametrize(("count", "share"), [(7, 0.0), (7, 0.1), (7, 0.2), (7, 0.3), (6, 0.34), (7, 0.49)])
def test_trimmed_mean(count: int, share: float, tmp_path: Path, seven: Siblings) -> None:
    """From each end, the whole part of share x N contributions is cut."""
    siblings = only(seven, count)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "trimmed-mean", "--trim", share)
    assert_equal(ours, named(siblings, aggregate.aggregate_trimmed_avg(results(siblings), share)), bodies(siblings))


@pytest.mark.parametrize(("count", "byzantine"), [(5, 1), (7, 0), (7, 1), (7, 2)])
def test_multi_krum(count: int, byzantine: int, tmp_path: Path, seven: Siblings) -> None:
    """The neighbours are the N - f - 2 nearest, and the average is the plain mean of those with the lowest scores.

    How many are averaged is Flower's own parameter; ours follows from N and f and is taken from the manifest.
    """
    siblings = only(seven, count)
    ours, report = fuse(tmp_path / "ours", siblings, "--method", "multi-krum", "--byzantine", byzantine)
    kept = [item["name"] for item in report["contributions"] if item["weight"]]
    assert 1 <= len(kept) <= count - byzantine
    theirs = aggregate.aggregate_krum(results(siblings), byzantine, len(kept))
    assert_equal(ours, named(siblings, theirs), bodies(siblings))
    if byzantine:
        assert "astray-3" not in kept
