"""The merge methods against mergekit's, through both tools' real entry points, on the same files.

Each test says in mergekit's terms what a method of ours is. What mergekit does per tensor is done per tensor here too.
These tests run in an environment that has mergekit (`make test-peers`) and are skipped in all others.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from against import Body, Siblings, assert_equal, fuse, make_siblings, read_body, write_weights

from helpers import tiny

pytest.importorskip("mergekit")

WEIGHTS = {"number-0": 1.0, "number-1": 2.5, "number-2": 0.5}


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return make_siblings(tmp_path_factory.mktemp("siblings"), 3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return make_siblings(tmp_path_factory.mktemp("pair"), 2)


def run_mergekit(
    output: Path,
    method: str,
    siblings: Siblings,
    parameters: dict[str, Any],
    *,
    base: Path | None = None,
    weights: dict[str, float] | None = None,
    dtype: str = "float32",
) -> Body:
    """Merge with mergekit. `parameters` hold for all inputs; `weights` are each contribution's own, by name."""
    config = pytest.importorskip("mergekit.config")
    merge = pytest.importorskip("mergekit.merge")
    options = pytest.importorskip("mergekit.options")
    models = [
        {"model": str(path), "parameters": {"weight": (weights or {}).get(path.name, 1.0)}}
        for path in siblings.contributions
    ]
    if method in ("slerp", "model_stock"):  # these know no weights
        models = [{"model": item["model"]} for item in models]
    document = {"merge_method": method, "dtype": dtype, "models": models, "parameters": parameters}
    if base is not None:
        document["base_model"] = str(base)
    merge.run_merge(
        config.MergeConfiguration.model_validate(document),
        str(output),
        options.MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False),
    )
    return read_body(output)


def bodies(siblings: Siblings) -> list[Body]:
    return [read_body(path) for path in (siblings.base, *siblings.contributions)]


def test_mean_is_linear(tmp_path: Path, siblings: Siblings) -> None:
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "mean")
    theirs = run_mergekit(tmp_path / "theirs", "linear", siblings, {})
    assert_equal(ours, theirs, bodies(siblings), epsilons=2)


def test_weighted_mean_is_weighted_linear(tmp_path: Path, siblings: Siblings) -> None:
    file = write_weights(tmp_path / "weights.json", WEIGHTS)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "mean", "--weights", file)
    theirs = run_mergekit(tmp_path / "theirs", "linear", siblings, {}, weights=WEIGHTS)
    assert_equal(ours, theirs, bodies(siblings), epsilons=2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mean_of_16_bit_inputs_is_linear(dtype: str, tmp_path: Path) -> None:
    """Both sum in more than 16 bits and round once, so a value may differ only where the sums round apart."""
    siblings = make_siblings(tmp_path / "siblings", 3, dtype=dtype)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "mean")
    theirs = run_mergekit(tmp_path / "theirs", "linear", siblings, {}, dtype=dtype)
    assert set(ours) == set(theirs)
    differing = sum(int((ours[name] != values).sum()) for name, values in theirs.items())
    assert differing <= sum(values.size for values in theirs.values()) // 1000
    spacing = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=spacing, atol=0, err_msg=name)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 2.5])
def test_task_arithmetic_is_the_normalised_one(scale: float, tmp_path: Path, siblings: Siblings) -> None:
    """mergekit adds λ times the sum of the differences unless told to normalise; ours adds λ times their mean."""
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "task-arithmetic", "--scale", scale)
    parameters = {"normalize": True, "lambda": scale}
    theirs = run_mergekit(tmp_path / "theirs", "task_arithmetic", siblings, parameters, base=siblings.base)
    assert_equal(ours, theirs, bodies(siblings))


def test_weighted_task_arithmetic(tmp_path: Path, siblings: Siblings) -> None:
    file = write_weights(tmp_path / "weights.json", WEIGHTS)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "task-arithmetic", "--scale", 1.5, "--weights", file)
    shares = {name: weight / sum(WEIGHTS.values()) for name, weight in WEIGHTS.items()}
    theirs = run_mergekit(
        tmp_path / "theirs", "task_arithmetic", siblings, {"lambda": 1.5}, base=siblings.base, weights=shares
    )
    assert_equal(ours, theirs, bodies(siblings))


@pytest.mark.parametrize(("density", "scale"), [(0.2, 1.0), (0.5, 0.4), (0.71, 1.0), (1.0, 2.0)])
def test_ties(density: float, scale: float, tmp_path: Path, siblings: Siblings) -> None:
    options = ("--method", "ties", "--density", density, "--scale", scale)
    ours, _ = fuse(tmp_path / "ours", siblings, *options)
    parameters = {"density": density, "lambda": scale}
    theirs = run_mergekit(tmp_path / "theirs", "ties", siblings, parameters, base=siblings.base)
    assert_equal(ours, theirs, bodies(siblings))


def test_weighted_ties(tmp_path: Path, siblings: Siblings) -> None:
    """The weights count in the election of the sign as well as in the mean of those who agree."""
    file = write_weights(tmp_path / "weights.json", WEIGHTS)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "ties", "--density", 0.5, "--weights", file)
    parameters = {"density": 0.5}
    theirs = run_mergekit(tmp_path / "theirs", "ties", siblings, parameters, base=siblings.base, weights=WEIGHTS)
    assert_equal(ours, theirs, bodies(siblings))


def test_ties_of_opposite_differences(tmp_path: Path) -> None:
    """Where the differences sum to exactly nothing, the positive one is taken."""
    base = tiny.make_base("roberta", tmp_path / "base", head="sequence")
    siblings = Siblings(base, (tmp_path / "plus", tmp_path / "minus"))
    plus, minus = (tiny.perturb(base, path, seed=0) / "model.safetensors" for path in siblings.contributions)
    start, metadata = tiny.read_tensors(base / "model.safetensors")
    moved, _ = tiny.read_tensors(plus)
    tiny.write_tensors(minus, [(name, 2 * start[name] - tensor) for name, tensor in moved.items()], metadata)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "ties", "--density", 1.0)
    theirs = run_mergekit(tmp_path / "theirs", "ties", siblings, {"density": 1.0}, base=base)
    exact = [name for name, values in read_body(base).items() if not values.any()]  # most biases: no rounding there
    assert exact
    for name in exact:
        assert (theirs[name] > 0).all()
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_dare_that_drops_nothing_is_dare_linear(tmp_path: Path, siblings: Siblings) -> None:
    """What is dropped at random cannot agree between two tools; that nothing is done at density 1 can."""
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "dare", "--density", 1.0, "--scale", 0.7)
    parameters = {"density": 1.0, "lambda": 0.7, "normalize": True}
    theirs = run_mergekit(tmp_path / "theirs", "dare_linear", siblings, parameters, base=siblings.base)
    assert_equal(ours, theirs, bodies(siblings))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock(count: int, tmp_path: Path) -> None:
    siblings = make_siblings(tmp_path / "siblings", count)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "model-stock")
    theirs = run_mergekit(tmp_path / "theirs", "model_stock", siblings, {}, base=siblings.base)
    assert_equal(ours, theirs, bodies(siblings), epsilons=8)


def test_model_stock_of_unrelated_differences(tmp_path: Path) -> None:
    """Where the updates' mean cosine is negative mergekit steps away from their mean; ours keeps the base there."""
    siblings = make_siblings(tmp_path / "siblings", 3, shared=0.0)
    ours, _ = fuse(tmp_path / "ours", siblings, "--method", "model-stock")
    theirs = run_mergekit(tmp_path / "theirs", "model_stock", siblings, {}, base=siblings.base)
    base, *others = bodies(siblings)
    cosines = {}
    for name, start in base.items():
        updates = np.stack([(body[name] - start).ravel() for body in others])
        updates /= np.linalg.norm(updates, axis=1, keepdims=True)
        cosines[name] = float((updates @ updates.T)[np.triu_indices(len(others), 1)].mean())
    assert min(cosines.values()) < 0 < max(cosines.values())
    expected = {name: theirs[name] if cosine > 0 else base[name] for name, cosine in cosines.items()}
    assert_equal(ours, expected, bodies(siblings), epsilons=8)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp(t: float, tmp_path: Path, pair: Siblings) -> None:
    """`--position` is the share of the second contribution; mergekit's base_model is the one at t = 0."""
    ours, _ = fuse(tmp_path / "ours", pair, "--method", "slerp", "--position", t)
    theirs = run_mergekit(tmp_path / "theirs", "slerp", pair, {"t": t}, base=pair.contributions[0])
    first, second = (read_body(path) for path in pair.contributions)
    cosines = {
        name: float((values * second[name]).sum() / np.linalg.norm(values) / np.linalg.norm(second[name]))
        for name, values in first.items()
    }
    straight = {name for name, cosine in cosines.items() if abs(cosine) > 0.9995}
    assert 0 < len(straight) < len(cosines)  # both the arc and, for nearly parallel tensors, the straight line
    assert not [name for name, cosine in cosines.items() if abs(abs(cosine) - 0.9995) < 1e-6]
    assert_equal(ours, theirs, bodies(pair), epsilons=16)
