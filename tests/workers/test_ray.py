"""Work on a Ray cluster: the same bytes as here, and errors in words. Nodes that die are in tests/scale."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldctl.artifacts import layout
from coldctl.fusing import blocks
from conftest import Ran
from helpers.made import contents
from helpers.s3_server import S3

pytest.importorskip("ray")

Run = Callable[..., Ran]


KINDS: tuple[tuple[str, ...], ...] = (
    ("--method", "ties", "--scale", "auto", "--max-shard-size", "100KB", "--screen", "reject"),
    ("--method", "model-stock", "--dtype", "float16"),
    (),
    ("--method", "geometric-median", "--outer-optimizer", "adam", "--no-verify"),
)
KINDS_IN_A_STORE: tuple[tuple[str, ...], ...] = (
    ("--max-shard-size", "30KB"),
    (),
    ("--outer-optimizer", "sgd"),
)


@pytest.mark.parametrize("flags", KINDS[:2], ids=" ".join)
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


@pytest.mark.parametrize("flags", KINDS_IN_A_STORE[:1], ids=" ".join)
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


def test_jobs_and_what_becomes_of_them(tmp_path: Path, cluster: Any, base: Path, suite: Path, coldctl: Run) -> None:
    """One that fails stops no other, and an evaluation in a cluster gives the numbers of one here."""
    there = ("--threads", 1, "--engine", "ray", "--ray-address", cluster.address)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one label is none", "label": 0}\n')
    text = suite.read_text().replace('path = "', f'path = "{suite.parent}/').replace('"./', f'"{suite.parent}/')
    mixed = tmp_path / "suite.toml"
    mixed.write_text(text.replace(f"{suite.parent}/green", str(broken)))
    ran = coldctl("finetune", "--suite", mixed, "--base", base, "--output", tmp_path / "some", *there)
    assert (ran.code, "only green" in ran.stderr) == (3, True), ran.stderr
    assert layout.is_complete(tmp_path / "some" / "red")
    few = tmp_path / "few.toml"
    few.write_text(text[: text.index('[[dataset]]\nname = "green"')])
    line = ("evaluate", tmp_path / "some" / "red", "--baseline", base, "--suite", few, "--output")
    assert coldctl(*line, tmp_path / "there", *there).code == 0
    assert coldctl(*line, tmp_path / "here", "--jobs", 1, "--threads", 1).code == 0
    results = [(tmp_path / name / "results.json").read_text() for name in ("there", "here")]
    assert results[0] == results[1]


def test_no_cluster_and_no_room(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    line = ("fuse", contributions, "--base", base, "--output", tmp_path / "out", "--engine", "ray")
    ran = coldctl(*line, "--ray-address", "127.0.0.1:1")
    assert (ran.code, "--ray-address 127.0.0.1:1: " in ran.stderr, "Traceback" in ran.stderr) == (2, True, False)
    ran = coldctl(*line, "--ray-address", "127.0.0.1:1:2")
    assert (ran.code, "Traceback" in ran.stderr) == (2, False)
    assert not (tmp_path / "out").exists()
