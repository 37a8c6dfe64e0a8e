"""`artifacts/manifest.py` by itself: what is written, what proves it, and what is refused."""

import hashlib
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.manifest import Manifest
from coldctl.common.digests import canonical, digest_of
from coldctl.common.errors import ManifestError
from coldctl.storage.local import LocalReader

LEAST: Manifest = {"kind": "fused", "name": "m", "body_digest": "sha256:0"}


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def document(**changed: Any) -> bytes:
    """A manifest that is as it was written, whatever it says."""
    content: dict[str, Any] = {"schema": 1, **LEAST, "files": {}, **changed}
    content = {key: value for key, value in content.items() if value is not ...}
    return json.dumps({**content, "manifest_digest": digest_of(content)}).encode()


def refused(data: bytes, words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        manifest.parse(data, "PLACE/coldctl.json")


def test_digests() -> None:
    assert digest_of({"b": [1, 2.5], "a": "é"}) == sha('{"a":"é","b":[1,2.5]}'.encode())


def test_digests_of_files_and_readers(tmp_path: Path) -> None:
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 5):
        data = bytes(index % 251 for index in range(1000)) * (size // 1000 + 1)
        path = tmp_path / str(size)
        path.write_bytes(data[:size])
        assert manifest.digest_of_file(path) == sha(data[:size])
        assert manifest.digest_of_reader(LocalReader(path)) == sha(data[:size])
    assert manifest._COPY == 1 << 20  # what is held in memory at a time


def test_times_and_versions() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest.now())
    found = manifest.environment(["numpy", "ml-dtypes"], device="cpu")
    assert list(found) == ["python", "machine", "ml-dtypes", "numpy", "device"]
    assert found["python"] == platform.python_version()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("two")
    (tmp_path / ".hidden").write_text("not of it")
    (tmp_path / "known").write_text("three")
    written = manifest.write(tmp_path, {**LEAST, "name": "é", "manifest_digest": "old"}, {"known": "sha256:known"})
    assert written["files"] == {"a.txt": sha(b"one"), "known": "sha256:known", "sub/b.txt": sha(b"two")}
    assert written["schema"] == 1
    assert manifest.read(tmp_path) == written
    text = (tmp_path / layout.MANIFEST).read_text()
    assert text.endswith("}\n")
    assert text.startswith('{\n  "')
    assert '"é"' in text
    assert manifest.changed_files(tmp_path, written) == ["known"]
    with pytest.raises(ManifestError, match="known was changed after it was written"):
        manifest.read_unchanged(tmp_path)
    again = manifest.write(tmp_path, written)
    assert layout.MANIFEST not in again["files"]
    assert manifest.read_unchanged(tmp_path) == again
    (tmp_path / "a.txt").unlink()
    (tmp_path / "sub" / "b.txt").write_text("2")
    assert manifest.changed_files(tmp_path, again) == ["a.txt", "sub/b.txt"]


def test_what_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no coldctl\.json"):
        manifest.read(tmp_path)
    for data, words in (
        (b"\xff", "not readable JSON"), (b"{", "not readable JSON"), (b"[]", "not a coldctl manifest"),
        (b"{}", "not a coldctl manifest"), (b'{"schema": "1"}', "not a coldctl manifest"),
        (b'{"schema": true}', "not a coldctl manifest"), (b'{"schema": 2}', "schema 2, newer than this program's 1"),
        (b'{"schema": 1}', "was changed after it was written"),
        (document().replace(b'"m"', b'"n"'), "was changed after it was written"),
        (b'{"schema": 1, "x": "\\ud800"}', "not readable JSON"),
    ):  # fmt: skip
        refused(data, words)
    assert manifest.parse(document(schema=0), "x")["schema"] == 0


def test_the_largest_manifest(tmp_path: Path) -> None:
    assert manifest.MANIFEST_LIMIT == 16 << 20
    data = document()
    filled = data + b" " * (manifest.MANIFEST_LIMIT - len(data))
    (tmp_path / layout.MANIFEST).write_bytes(filled)
    assert manifest.read(tmp_path)["name"] == "m"
    (tmp_path / layout.MANIFEST).write_bytes(filled + b" ")
    with pytest.raises(ManifestError, match="not readable JSON"):
        manifest.read(tmp_path)


def test_write_refuses_a_manifest_that_nobody_could_read(tmp_path: Path) -> None:
    spare = manifest.MANIFEST_LIMIT - len(
        json.dumps(manifest.write(tmp_path, {**LEAST, "config": {"x": ""}}), indent=2)
    )
    largest = manifest.write(tmp_path, {**LEAST, "config": {"x": "a" * (spare - 1)}})
    assert (tmp_path / layout.MANIFEST).stat().st_size == manifest.MANIFEST_LIMIT
    assert manifest.read(tmp_path) == largest
    (tmp_path / layout.MANIFEST).unlink()
    with pytest.raises(ManifestError, match="would have 16777217 bytes, and 16777216 can be read") as raised:
        manifest.write(tmp_path, {**LEAST, "config": {"x": "a" * spare}})
    assert "\n" not in raised.value.message
    assert not layout.is_complete(tmp_path)


def test_docs_state_the_manifest_limit() -> None:
    limit = f"{manifest.MANIFEST_LIMIT >> 20} MiB"
    docs = Path(__file__).parents[2] / "docs"
    assert f"| {limit}, the limit of a manifest: " in (docs / "scale.md").read_text()
    row = next(line for line in (docs / "security.md").read_text().splitlines() if "a JSON document (manifest," in line)
    assert f"| {limit}, " in row


RECORD: dict[str, Any] = {"name": "c", "body_digest": "x", "weight": 0.5, "status": "fused"}
GENERATION: dict[str, Any] = {"kind": "fused", "name": "a", "body_digest": "x", "contributions": [RECORD]}
FINE: list[dict[str, Any]] = [
    {}, {"iteration": None}, {"iteration": 0}, {"iteration": 999_999}, {"license": None},
    {"unknown": object}, {"files": {"a/b.txt": "x", ".hidden": "x", "a..b": "x"}}, {"ancestors": [GENERATION]},
    {"dataset": {"name": None, "num_train": None, "labels": ["x"]}}, {"metrics": {"v": {"accuracy": 1, "f1": None}}},
    {"name": "n" * 200}, {"files": {"f" * 1000: "x"}},
    {"contributions": [{**RECORD, "weight": 1, "reason": None, "verified": True, "notes": ["x"]}]},
    {"kind": "contribution"}, {"kind": "published"}, {"kind": "evaluation"},
]  # fmt: skip
WRONG: list[dict[str, Any]] = [
    {"kind": "else"}, {"kind": ...}, {"name": ...}, {"name": ""}, {"name": "."}, {"name": ".."}, {"name": "a/b"},
    {"name": "a\\b"}, {"name": "a\0"}, {"name": "a\n"}, {"name": "a\r"}, {"name": 3}, {"body_digest": ...},
    {"body_digest": None}, {"files": ...}, {"files": []}, {"files": {"a": 1}}, {"iteration": "1"}, {"iteration": True},
    {"iteration": -1}, {"iteration": 1_000_000}, {"iteration": 1.0}, {"license": 1}, {"base": "x"},
    {"name": "n" * 201}, {"name": "é" * 101},
    {"ancestors": {}}, {"ancestors": ["x"]}, {"ancestors": [{**GENERATION, "contributions": [{**RECORD, "name": "/"}]}]},
    {"contributions": {}}, {"contributions": [{}]}, {"contributions": [{**RECORD, "weight": "1"}]},
    {"contributions": [{**RECORD, "weight": True}]}, {"contributions": [{**RECORD, "notes": [1]}]},
    {"metrics": {"v": 1}}, {"dataset": {"labels": "x"}}, {"outside_body": {"a": None}},
]  # fmt: skip
OUTSIDE = ["/a", "../a", "a/../b", "a/..", "..", "", "a//b", "a/", "./a", "a\0b", "f" * 1001]


@pytest.mark.parametrize("changed", FINE, ids=str)
def test_what_fits_the_contract(changed: dict[str, Any]) -> None:
    changed = {key: ("x" if value is object else value) for key, value in changed.items()}
    found: Any = manifest.parse(document(**changed), "x")
    assert {key: found[key] for key in changed} == changed


@pytest.mark.parametrize("changed", WRONG, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_the_contract(changed: dict[str, Any]) -> None:
    words = "Expected `|missing required field `|Invalid enum value '|cannot name a file|lists no files"
    refused(document(**changed), f"PLACE/coldctl.json: .*({words})")


def test_a_mismatch_names_the_key_and_what_it_should_be() -> None:
    refused(
        document(contributions=[{**RECORD, "weight": "1"}]),
        r"PLACE/coldctl.json: Expected `float`, got `str` - at `\$.contributions\[0\].weight`. Fetch or make",
    )
    refused(document(kind="\x1b" + "x" * 10_000), "^.{,300}$")


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda value: repr(value)[:20])
def test_files_stay_inside(name: str) -> None:
    refused(document(files={"fine": "x", name: "x"}), "names a path outside the directory")


def test_what_descendants_carry() -> None:
    whole: Any = {
        **LEAST, "iteration": 3, "created": "then", "base": {"name": "b", "body_digest": "x"}, "license": "mit",
        "files": {"a": "x"}, "identity": "i", "config": {"seed": 1}, "contributions": [{"name": "c"}], "ancestors": [LEAST],
    }  # fmt: skip
    short = manifest.shortened(whole)
    assert short == {key: whole[key] for key in whole if key not in ("files", "identity", "ancestors")}
    assert manifest.shortened(LEAST) == LEAST


def test_canonical_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    order: Callable[..., bytes] = canonical
    assert order({"a": 1, "b": {"d": 1, "c": 2}}) == order({"b": {"c": 2, "d": 1}, "a": 1})
