"""The arithmetic by itself: rounding, means, digests, metrics and intervals against independent computations."""

import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coldctl.checkpoints.checkpoint import open_checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.checkpoints.header import DTYPES, rounded
from coldctl.data.sampling import stratified
from coldctl.evaluation import scoring
from coldctl.fusing import methods
from coldctl.fusing.blocks import Digester, block_length, cut, read_blocks
from coldctl.storage.local import LocalFolder

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=9))
def test_the_mean_lies_inside_and_is_exact(rows: list[list[float]]) -> None:
    parts = [np.asarray(row, np.float32) for row in rows]
    found = rounded(methods.mean(parts), np.dtype(np.float32))
    assert np.all(found >= np.min(parts, axis=0))
    assert np.all(found <= np.max(parts, axis=0))
    for index, value in enumerate(methods.mean(parts)):
        column = [Fraction(float(part[index])) for part in parts]
        exact = sum(column, Fraction(0)) / len(parts)
        assert abs(Fraction(float(value)) - exact) <= max(map(abs, column)) / 2**48


@given(st.lists(FLOATS, min_size=1, max_size=50), st.integers(1, 40))
def test_copies_give_themselves(values: list[float], count: int) -> None:
    part = np.asarray(values, np.float32)
    np.testing.assert_array_equal(rounded(methods.mean([part] * count), part.dtype), part)
    wide = np.asarray(values, np.float64) / 3
    np.testing.assert_array_equal(methods.mean([wide] * count), wide)


@settings(max_examples=300)
@given(st.floats(-3e38, 3e38, allow_nan=False))
def test_bfloat16_is_rounded_once(value: float) -> None:
    """The nearest bfloat16, ties to even, decided in exact arithmetic."""
    found = float(rounded(np.asarray([value]), DTYPES["BF16"])[0])
    if np.isinf(found):
        assert abs(value) >= 3.38e38
        return
    bits = int(np.asarray([found], ml_dtypes.bfloat16).view(np.uint16)[0])
    neighbours = [
        np.asarray([bits + step], np.uint16).view(ml_dtypes.bfloat16)[0]
        for step in (-1, 0, 1)
        if 0 <= bits + step < 1 << 16
    ]
    distances = {
        abs(Fraction(float(n)) - Fraction(value)): int(np.asarray([n]).view(np.uint16)[0])
        for n in neighbours
        if np.isfinite(n)
    }
    assert abs(Fraction(found) - Fraction(value)) == min(distances)


def test_double_rounding_is_avoided() -> None:
    # Just above the middle between two bfloat16: float32 rounds it to the middle, and from there it would fall to even.
    value = 1 + 2.0**-8 + 2.0**-40
    assert float(rounded(np.asarray([value]), DTYPES["BF16"])[0]) == 1 + 2.0**-7
    assert float(np.asarray([value]).astype(ml_dtypes.bfloat16)[0]) == 1.0


def test_the_body_digest_is_what_the_contract_says(base: Path) -> None:
    from safetensors.numpy import load_file

    hasher = hashlib.sha256()
    for name, array in sorted(load_file(base / "model.safetensors").items()):
        if array.dtype.kind == "f":
            hasher.update(
                name.encode() + b"\0F32\0" + ",".join(map(str, array.shape)).encode() + b"\0" + array.tobytes()
            )
    assert body_digest(open_checkpoint(LocalFolder(base), "base")) == "sha256:" + hasher.hexdigest()


@pytest.mark.parametrize("length", [1, 7, 1000, 1 << 20])
def test_blocks_cover_everything_whatever_their_length(length: int, base: Path, contributions: Path) -> None:
    inputs = [open_checkpoint(LocalFolder(child), child.name) for child in sorted(contributions.iterdir())]
    start = open_checkpoint(LocalFolder(base), "base")
    names = sorted(name for name, tensor in start.body.items() if tensor.floating)
    digesters = [None, *(Digester() for _ in inputs)]
    collected: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    for block in read_blocks(start, inputs, cut(start, inputs, names, length), digesters):
        collected[block.name].append(block.contributions[1].copy())
    for name in names:
        np.testing.assert_array_equal(np.concatenate(collected[name]), inputs[1].read(name).reshape(-1))
    for checkpoint, digester in zip(inputs, digesters[1:], strict=True):
        assert digester is not None
        assert digester.body_digest() == body_digest(checkpoint)


def test_memory_of_blocks_does_not_grow() -> None:
    sizes = [block_length(width) * width for width in (8, 64, 512, 4096, 40000)]
    assert max(sizes) * 2 <= 48 << 20


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "matthews"])
def test_resampled_metrics_are_those_of_the_library(metric: str) -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, 300)
    predictions = np.where(generator.random(300) < 0.6, truth, generator.integers(0, 4, 300))
    if metric != "accuracy":
        assert 100 * scoring._fast_metric(metric)(truth, predictions) == pytest.approx(
            scoring.score(metric, truth, predictions)
        )
    outcome = scoring.Outcome(metric, truth, predictions[None], np.roll(truth, 1)[None])
    gains = scoring.resampled_gains(outcome, 0)
    gain = scoring.score(metric, truth, predictions) - scoring.score(metric, truth, np.roll(truth, 1))
    judged = scoring.judged(gain, gains, certain=True)
    assert judged.interval[0] < gain < judged.interval[1]
    assert judged.verdict == "better"
    assert np.mean(gains) == pytest.approx(gain, abs=1.5)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_correlations_are_those_of_the_library_and_nothing_where_nothing_varies(metric: str) -> None:
    generator = np.random.default_rng(0)
    truth = generator.normal(size=50)
    predictions = truth + generator.normal(size=50)
    fast = scoring._fast_metric(metric)
    assert 100 * fast(truth, predictions) == pytest.approx(scoring.score(metric, truth, predictions))
    assert fast(truth, np.ones(50)) == fast(np.ones(50), predictions) == 0.0


def test_intervals_hold_what_they_promise() -> None:
    """Over many simulated evaluations of equal models, about one in twenty intervals misses zero."""
    generator = np.random.default_rng(1)
    misses = 0
    for trial in range(200):
        truth = np.ones(200, np.int64)
        hits = (generator.random((2, 1, 200)) < 0.7).astype(np.int64)
        outcome = scoring.Outcome("accuracy", truth, hits[0], hits[1])
        gain = 100.0 * float(hits[0].mean() - hits[1].mean())
        misses += (
            scoring.judged(gain, scoring.resampled_gains(outcome, trial), certain=True).verdict != "indistinguishable"
        )
    assert 2 <= misses <= 20


def test_seeds_widen_the_interval() -> None:
    generator = np.random.default_rng(2)
    truth = np.ones(400, np.int64)
    steady = (generator.random((1, 400)) < 0.7).astype(np.int64).repeat(5, 0)
    shaky = np.stack([(generator.random(400) < rate).astype(np.int64) for rate in (0.5, 0.6, 0.7, 0.8, 0.9)])
    widths = []
    for predictions in (steady, shaky):
        low, high = np.percentile(
            scoring.resampled_gains(scoring.Outcome("accuracy", truth, predictions, steady), 0), [2.5, 97.5]
        )
        widths.append(high - low)
    assert widths[1] > widths[0] + 5


@pytest.mark.parametrize("metrics", [("accuracy",), ("accuracy", "macro_f1"), ("matthews",)])
def test_what_shares_its_trainings_shares_their_luck(metrics: tuple[str, ...]) -> None:
    """One training of all datasets is lucky for all: their average is no surer of its seeds than each of them."""
    generator = np.random.default_rng(3)
    outcomes = []
    for dataset in range(8):
        truth = generator.integers(0, 2, 1000)
        wrong = generator.random((4, 1000)) < np.array([[0.10], [0.25], [0.15], [0.30]])
        old = np.repeat(generator.random((1, 1000)) < 0.2, 4, 0)
        outcomes.append(scoring.Outcome(metrics[dataset % len(metrics)], truth, truth ^ wrong, truth ^ old))
    apart = np.mean([scoring.resampled_gains(outcome, seed) for seed, outcome in enumerate(outcomes)], 0)
    together = np.mean([scoring.resampled_gains(outcome, seed, 99) for seed, outcome in enumerate(outcomes)], 0)
    one = scoring.resampled_gains(outcomes[0], 0, 99)
    assert together.std() > 2 * apart.std()
    assert np.corrcoef(together, one)[0, 1] > 0.7


@given(st.lists(st.integers(0, 4), min_size=5, max_size=200), st.integers(5, 60), st.integers(0, 9))
def test_stratified_draws(labels: list[int], count: int, seed: int) -> None:
    chosen = stratified(labels, count, seed)
    assert len(chosen) == min(count, len(labels)) == len(set(chosen))
    assert {labels[index] for index in chosen} == set(labels)
    assert chosen == stratified(labels, count, seed)
