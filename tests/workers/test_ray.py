"""Work on a Ray cluster: the same bytes as here, and errors in words. Nodes that die are in tests/scale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldctl.artifacts import layout
from conftest import Ran
from helpers.cluster import KINDS, KINDS_IN_A_STORE, check_cluster_fuses_in_parts, check_cluster_fuses_in_store
from helpers.s3_server import S3

pytest.importorskip("ray")

Run = Callable[..., Ran]


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
    check_cluster_fuses_in_parts(flags, tmp_path, cluster, base, contributions, coldctl, monkeypatch)


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
    check_cluster_fuses_in_store(flags, tmp_path, cluster, s3, base, contributions, coldctl, monkeypatch)


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
