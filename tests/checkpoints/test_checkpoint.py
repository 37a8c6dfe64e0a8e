"""Strangers' bytes: every inconsistency of a safetensors file or index is refused before anything is written."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Ran
from helpers import tiny

Run = Callable[..., Ran]


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        header, data = header_of(path)
        change(header)
        rewrite(path, header, data)

    return apply


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header[next(name for name in header if name != "__metadata__")]
    return entry


def duplicated(path: Path) -> None:
    header, data = header_of(path)
    text = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    rewrite(path, f'{text[:-1]}, "{name}": {json.dumps(header[name])}}}', data)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-10]), "its header says"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "its header says"),
    "empty": (lambda path: path.write_bytes(b""), "too short"),
    "header beyond the file": (lambda path: path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:]), "header of"),
    "header no JSON": (lambda path: rewrite(path, "{nonsense", header_of(path)[1]), "not readable JSON"),
    "header a list": (lambda path: rewrite(path, "[]", header_of(path)[1]), "not a JSON object"),
    "deep header": (lambda path: rewrite(path, "[" * 100_000, b""), "not readable JSON"),
    "duplicate key": (duplicated, "a key stands twice"),
    "overlap": (edited(lambda h: first(h).update(data_offsets=[4, first(h)["data_offsets"][1] + 4])), "gap or overlap"),
    "offset out of range": (edited(lambda h: first(h).update(data_offsets=[1 << 50, (1 << 50) + 4])), "does not fill"),
    "negative offset": (edited(lambda h: first(h).update(data_offsets=[-4, 0])), "impossible"),
    "wrong dtype size": (edited(lambda h: first(h).update(dtype="F16")), "does not fill"),
    "unknown dtype": (edited(lambda h: first(h).update(dtype="F12")), "not supported"),
    "dtype no text": (edited(lambda h: first(h).update(dtype=["F32"])), "not supported"),
    "shape overflows": (edited(lambda h: first(h).update(shape=[1 << 40, 1 << 40])), "does not fill"),
    "negative shape": (edited(lambda h: first(h).update(shape=[-1, -16])), "impossible"),
    "shape no list": (edited(lambda h: first(h).update(shape=16)), "impossible"),
    "shape of floats": (edited(lambda h: first(h).update(shape=[16.0])), "impossible"),
    "entry no object": (edited(lambda h: h.update(extra=3)), "lacks dtype"),
    "offsets missing": (edited(lambda h: first(h).pop("data_offsets")), "lacks dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_broken_files(case: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    damage, words = BREAKS[case]
    good = tiny.perturb(base, tmp_path / "good", seed=1)
    bad = tiny.perturb(base, tmp_path / "bad", seed=2)
    damage(bad / "model.safetensors")
    for command in (
        ("fuse", good, bad, "--base", base, "--output", tmp_path / "fused"),
        ("check", good, bad, "--base", base),
    ):
        ran = coldctl(*command, "--json")
        assert ran.code == (2 if command[0] == "fuse" else 3)
        assert words in ran.stdout, ran.stdout
        assert not (tmp_path / "fused").exists()
        assert not (tmp_path / ".fused.partial").exists()


def sharded(base: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    tiny.reshard(base, folder, shards=3)
    return folder / "model.safetensors.index.json", json.loads((folder / "model.safetensors.index.json").read_text())


def test_broken_indexes(tmp_path: Path, base: Path, coldctl: Run) -> None:
    def attempt(name: str, change: Callable[[Path, dict[str, Any]], object], words: str) -> None:
        index, document = sharded(base, tmp_path / name)
        change(index, document)
        ran = coldctl("fuse", index.parent, "--base", base, "--output", tmp_path / "out", "--json")
        assert ran.code == 2
        assert words in ran.stdout, ran.stdout
        assert not (tmp_path / "out").exists()

    def point_outside(index: Path, document: dict[str, Any]) -> None:
        key = next(iter(document["weight_map"]))
        document["weight_map"][key] = "../secret.safetensors"
        index.write_text(json.dumps(document))

    def absolute(index: Path, document: dict[str, Any]) -> None:
        key = next(iter(document["weight_map"]))
        document["weight_map"][key] = "/etc/passwd"
        index.write_text(json.dumps(document))

    def lose(index: Path, document: dict[str, Any]) -> None:
        document["weight_map"]["encoder.ghost"] = next(iter(document["weight_map"].values()))
        index.write_text(json.dumps(document))

    def unlisted(index: Path, document: dict[str, Any]) -> None:
        document["weight_map"].pop(next(iter(document["weight_map"])))
        index.write_text(json.dumps(document))

    def link_outside(index: Path, document: dict[str, Any]) -> None:
        shard = index.parent / next(iter(document["weight_map"].values()))
        shard.rename(tmp_path / "elsewhere.safetensors")
        shard.symlink_to(tmp_path / "elsewhere.safetensors")

    def link_further_up(index: Path, document: dict[str, Any]) -> None:
        key, shard = next(iter(document["weight_map"].items()))
        (tmp_path / "far" / "b").mkdir(parents=True)
        (index.parent / shard).rename(tmp_path / "far" / "b" / shard)
        (index.parent / "a").symlink_to(tmp_path / "far")
        document["weight_map"] = {
            name: f"a/b/{shard}" if file == document["weight_map"][key] else file
            for name, file in document["weight_map"].items()
        }
        index.write_text(json.dumps(document))

    attempt("a", point_outside, "outside the directory")
    attempt("b", absolute, "outside the directory")
    attempt("c", lose, "which no shard holds")
    attempt("d", unlisted, "not in the index")
    attempt("e", link_outside, "link to outside")
    attempt("h", link_further_up, "link to outside")
    attempt("f", lambda index, _: index.write_text('{"weight_map": []}'), "no weight_map")
    attempt("g", lambda index, _: index.write_text("{"), "not readable JSON")


def test_the_hub_caches_own_links_are_followed(tmp_path: Path, base: Path, coldctl: Run) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    ran = coldctl("fuse", snapshot, "--base", base, "--output", tmp_path / "fused")
    assert ran.code == 0, ran.stderr


def test_shards_are_loaded_as_one_file_is(tmp_path: Path, base: Path) -> None:
    import torch

    from coldctl.training.model import load_body

    whole, parts = load_body(base).state_dict(), load_body(sharded(base, tmp_path / "parts")[0].parent).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_custom_code_is_never_run(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    evil = shutil.copytree(base, tmp_path / "evil")
    config = json.loads((evil / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model", "AutoModelForSequenceClassification": "evil.Model"}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    ran = coldctl("check", evil, "--base", base)
    assert "auto_map" in ran.stderr
    coldctl("finetune", dataset, "--base", evil, "--output", tmp_path / "out", "--epochs", 1)
    assert not (tmp_path / "ran").exists()


def test_remote_folders_are_read_by_ranges(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for child in contributions.iterdir():
        for file in child.iterdir():
            memory.pipe_file(f"/contributions/{child.name}/{file.name}", file.read_bytes())
    for file in base.iterdir():
        memory.pipe_file(f"/base/{file.name}", file.read_bytes())
    try:
        remote = coldctl("fuse", "memory://contributions", "--base", "memory://base", "--output", tmp_path / "remote")
        assert remote.code == 0, remote.stderr
        assert coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "local").code == 0
        first, second = ((tmp_path / where / "model.safetensors").read_bytes() for where in ("remote", "local"))
        assert first == second
        memory.pipe_file("/contributions/one/model.safetensors", b"short")
        ran = coldctl("fuse", "memory://contributions", "--base", base, "--output", tmp_path / "bad")
        assert ran.code == 2
    finally:
        memory.store.clear()
