"""Cells and features on disk: reused, verified, and deleted when there are too many."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldctl.artifacts.output import write_text
from coldctl.evaluation import cache
from conftest import Ran
from helpers import tiny

Run = Callable[..., Ran]


def test_commands_that_share_cells_may_write_the_same_one(tmp_path: Path) -> None:
    """Two evaluations in one RUN both measure its pretrained model; neither may break or truncate the other's cell."""
    text = "x" * (1 << 20)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_text(tmp_path / "cell.json", text), range(200)))
    assert [path.name for path in tmp_path.iterdir()] == ["cell.json"]
    assert (tmp_path / "cell.json").read_text() == text


def test_features_are_reused_across_outputs(
    tmp_path: Path, base: Path, suite: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run
) -> None:
    monkeypatch.setenv("COLDCTL_CACHE", str(tmp_path / "cache"))
    other = tiny.perturb(base, tmp_path / "other", seed=1)

    def results(output: str, *flags: object) -> str:
        ran = coldctl("evaluate", other, "--baseline", base, "--suite", suite, "--output", tmp_path / output,
                      "--jobs", 1, *flags)  # fmt: skip
        assert ran.code == 0, ran.stderr
        return (tmp_path / output / "results.json").read_text()

    first = results("one")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "features").iterdir()}
    assert len(files) == 6  # two models, three datasets
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    size = {path.stat().st_size for path in files}
    # What is read is what is used: other features under the same name give other results.
    victim = sorted(files)[0]
    whole = victim.read_bytes()
    victim.write_bytes(sorted(files)[1].read_bytes())
    swapped = results("swapped")
    assert {path.stat().st_size for path in files} == size
    assert swapped != first
    # What is damaged is computed anew.
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert results("two") == first
    assert victim.read_bytes() == whole
    assert results("three", "--pooling", "first") != first
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 12


def test_evaluate_goes_on_without_a_writable_cache(
    tmp_path: Path, base: Path, suite: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COLDCTL_CACHE", str(tmp_path / "file"))
    ran = coldctl("evaluate", tiny.perturb(base, tmp_path / "other", seed=1), "--baseline", base, "--suite", suite,
                  "--output", tmp_path / "out", "--jobs", 1)  # fmt: skip
    assert ran.code == 0
    assert "features are not cached" in ran.stderr


def test_cache_deletes_the_least_recently_used_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDCTL_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "LIMIT", 3000)
    computed = []

    def features(number: int) -> np.ndarray[Any, Any]:
        computed.append(number)
        return np.full((10, 25), number, np.float32)

    for place, number in enumerate((0, 1, 0, 2)):
        (features_read,) = cache.cached_features({"number": number}, lambda: [features(number)], pytest.fail)  # noqa: B023
        assert features_read[0, 0] == number
        for path in (tmp_path / "features").iterdir():  # clocks of file systems are coarse
            if path.stat().st_mtime > 1e6:
                os.utime(path, (place, place))
    assert computed == [0, 1, 2]
    cache.cached_features({"number": 0}, lambda: [features(0)], pytest.fail)
    cache.cached_features({"number": 1}, lambda: [features(1)], pytest.fail)
    assert computed == [0, 1, 2, 1]
    monkeypatch.setattr(cache, "LIMIT", 10)  # nothing fits
    cache.cached_features({"number": 3}, lambda: [features(3)], pytest.fail)
    assert not list((tmp_path / "features").iterdir())
