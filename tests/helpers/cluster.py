"""Fusing on a Ray cluster, compared with the same on one machine."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldctl.fusing import blocks
from conftest import Ran
from helpers.made import contents
from helpers.s3_server import S3

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


def check_cluster_fuses_in_parts(
    flags: tuple[str, ...],
    tmp_path: Path,
    cluster: Any,
    base: Path,
    contributions: Path,
    coldctl: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that a cluster, whose workers read, compute and write a block range each, writes the bytes of one machine."""
    monkeypatch.setattr(blocks, "_CHUNK", 1 << 18)  # tiny models would be a single part
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


def check_cluster_fuses_in_store(
    flags: tuple[str, ...],
    tmp_path: Path,
    cluster: Any,
    s3: S3,
    base: Path,
    contributions: Path,
    coldctl: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that a cluster writes the bytes of one machine into a store, where a whole file is the unit of work."""
    monkeypatch.setattr(blocks, "_CHUNK", 1 << 18)
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
