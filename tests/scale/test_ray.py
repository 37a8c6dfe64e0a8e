"""The same work on a Ray cluster of several node processes: the same bytes, and nothing lost when a node is."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from coldctl.core import blocks
from conftest import Ran, suite_text
from s3_server import S3

pytest.importorskip("ray")

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def cluster(s3_server: S3) -> Iterator[Any]:
    """A cluster of one core, whose nodes find the store; tests add nodes as they need them."""
    from ray.cluster_utils import Cluster

    environment = pytest.MonkeyPatch()
    for name, value in {**s3_server.environment, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}.items():
        environment.setenv(name, value)
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    started = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield started
    finally:
        started.shutdown()
        environment.undo()


@pytest.fixture
def second(cluster: Any) -> Any:
    """A second node of one core."""
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


def contents(folder: Path) -> dict[str, Any]:
    """What a stage wrote, without what may differ: the digests of files, and the manifest but for time and place."""
    document = json.loads((folder / "coldctl.json").read_text())
    document["files"] = {name: digest for name, digest in document["files"].items() if "coldctl.json" not in name}
    return {key: value for key, value in document.items() if key not in ("created", "environment", "manifest_digest")}


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


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--method", "ties", "--scale", "auto", "--max-shard-size", "100KB", "--screen", "reject"),
        ("--method", "model-stock", "--dtype", "float16"),
        ("--method", "geometric-median", "--outer-optimizer", "adam", "--no-verify"),
        ("--leave-one-out",),
    ],
    ids=" ".join,
)
def test_a_cluster_fuses_in_parts(
    flags: tuple[str, ...],
    tmp_path: Path,
    cluster: Any,
    base: Path,
    contributions: Path,
    coldctl: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every part is read, computed and written by whoever is free, and what stands there is what one machine writes."""
    monkeypatch.setattr(blocks, "_STRETCH", 1 << 18)  # tiny models would be a single part
    common = ("fuse", contributions, "--base", base, *flags, "--output")
    here = coldctl(*common, tmp_path / "here" / "fused", "--json")
    there = coldctl(
        *common, tmp_path / "there" / "fused", "--json", "--engine", "ray", "--ray-address", cluster.address
    )
    assert (here.code, there.code) == (0, 0), here.stderr + there.stderr
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file()]
    for name in files:
        if name.name == "coldctl.json":
            assert contents(tmp_path / "there" / name.parent) == contents(tmp_path / "here" / name.parent)
        else:
            assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name
    assert here.json["contributions"] == there.json["contributions"]  # norms and cosines to the last bit


@pytest.mark.parametrize(
    "flags", [(), ("--leave-one-out", "--max-shard-size", "30KB"), ("--outer-optimizer", "sgd")], ids=" ".join
)
def test_a_cluster_fuses_in_a_store(
    flags: tuple[str, ...],
    tmp_path: Path,
    cluster: Any,
    s3: S3,
    base: Path,
    contributions: Path,
    coldctl: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing can be written by position, each file is one piece of work."""
    monkeypatch.setattr(blocks, "_STRETCH", 1 << 18)
    common = ("fuse", contributions, "--base", base, *flags, "--output")
    here = coldctl(*common, tmp_path / "fused", "--json")
    there = coldctl(*common, f"{s3.url}/fused", "--json", "--engine", "ray", "--ray-address", cluster.address)
    assert (here.code, there.code) == (0, 0), here.stderr + there.stderr
    kept = {name: digest for name, digest in here.json["files"].items() if "coldctl.json" not in name}
    assert kept == {name: digest for name, digest in there.json["files"].items() if "coldctl.json" not in name}
    for name, digest in kept.items():
        assert "sha256:" + hashlib.sha256(s3.read(f"fused/{name}")).hexdigest() == digest
    assert here.json["body_digest"] == there.json["body_digest"]
    assert here.json["contributions"] == there.json["contributions"]


def test_a_node_that_dies_costs_only_what_it_was_doing(
    tmp_path: Path, cluster: Any, second: Any, base: Path, coldctl: Run
) -> None:
    for seed, (name, examples) in enumerate({"red": 8, "green": 160, "blue": 160}.items()):
        tiny.make_dataset(tmp_path / name, seed=seed, train=examples)
    suite = tmp_path / "suite.toml"
    suite.write_text(suite_text("base").replace("unseen", "seen").replace("epochs = 1", "epochs = 60"))
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
