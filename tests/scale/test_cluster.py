"""The same work on a Ray cluster of several node processes: the same bytes, and nothing lost when a node is."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Ran, suite_text
from helpers import tiny
from helpers.cluster import KINDS, KINDS_IN_A_STORE, check_cluster_fuses_in_parts, check_cluster_fuses_in_store
from helpers.made import contents
from helpers.s3_server import S3

pytest.importorskip("ray")

Run = Callable[..., Ran]


@pytest.fixture
def second(cluster: Any) -> Any:
    """A second node of one core."""
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


def test_a_cluster_writes_the_same_bytes(
    tmp_path: Path, cluster: Any, second: Any, suite: Path, base: Path, coldctl: Run
) -> None:
    places = {"local": ("--jobs", 1), "ray": ("--engine", "ray", "--ray-address", cluster.address)}
    for engine, flags in places.items():
        folder, same = tmp_path / engine, ("--suite", suite, "--threads", 1, *flags)
        made = coldctl("finetune", "--base", base, "--output", folder / "contributions", *same)
        assert made.code == 0, made.stderr
        model = folder / "contributions" / "red"
        ran = coldctl("evaluate", model, "--baseline", base, "--output", folder / "evaluation", *same)
        assert ran.code == 0, ran.stderr
    for name in ("contributions/red", "contributions/green", "evaluation"):
        assert contents(tmp_path / "ray" / name) == contents(tmp_path / "local" / name)
    results = [(tmp_path / engine / "evaluation" / "results.json").read_text() for engine in places]
    assert results[0] == results[1]


def test_a_node_that_dies_costs_only_what_it_was_doing(
    tmp_path: Path, cluster: Any, second: Any, base: Path, coldctl: Run
) -> None:
    for seed, (name, examples) in enumerate({"red": 8, "green": 160, "blue": 160}.items()):
        tiny.make_dataset(tmp_path / name, seed=seed, train=examples)
    suite = tmp_path / "suite.toml"
    suite.write_text(suite_text("base").replace("unseen", "seen").replace("epochs = 1", "epochs = 200"))
    common = ("finetune", "--suite", suite, "--base", base, "--threads", "1", "--output")
    command = [sys.executable, "-m", "coldctl", *map(str, common), str(tmp_path / "ray")]
    running = subprocess.Popen(
        [*command, "--engine", "ray", "--ray-address", cluster.address], stderr=subprocess.PIPE, text=True
    )
    done, busy = (
        tmp_path / "ray" / "red",
        [tmp_path / "ray" / f".{name}.partial" / "training" for name in ("green", "blue")],
    )
    deadline = time.monotonic() + 200
    while not (done.is_dir() and all(folder.is_dir() for folder in busy)):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done.iterdir()}
    cluster.remove_node(second, allow_graceful=False)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    assert errors.count("its worker or node was lost, it is done again") == 1, errors
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done.iterdir()}
    assert coldctl(*common, tmp_path / "local", "--jobs", 1).code == 0
    for name in ("red", "green", "blue"):
        assert contents(tmp_path / "ray" / name) == contents(tmp_path / "local" / name)


@pytest.mark.parametrize("flags", KINDS[2:], ids=" ".join)
def test_every_other_kind_of_fuse(
    flags: tuple[str, ...],
    tmp_path: Path,
    cluster: Any,
    base: Path,
    contributions: Path,
    coldctl: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_cluster_fuses_in_parts(flags, tmp_path, cluster, base, contributions, coldctl, monkeypatch)


@pytest.mark.parametrize("flags", KINDS_IN_A_STORE[1:], ids=" ".join)
def test_every_other_kind_of_fuse_in_a_store(
    flags: tuple[str, ...],
    tmp_path: Path,
    cluster: Any,
    s3: S3,
    base: Path,
    contributions: Path,
    coldctl: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_cluster_fuses_in_store(flags, tmp_path, cluster, s3, base, contributions, coldctl, monkeypatch)
