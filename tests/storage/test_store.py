"""A store in place of a disk: a whole round in a bucket, two writers, requests that fail, objects that change."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.numpy
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from coldctl.artifacts import layout, manifest, output
from coldctl.checkpoints import writer as weights
from coldctl.common.errors import CheckpointError, OutputError
from coldctl.storage import conditional_write
from coldctl.storage.location import locate
from coldctl.storage.remote import open_folder
from conftest import FAST, Ran
from helpers.s3_server import S3
from helpers.unreliable import Faults, unreliable

Run = Callable[..., Ran]
WEIGHTS = "model.safetensors"


@pytest.fixture
def store(s3: S3, base: Path, contributions: Path) -> S3:
    """A bucket that holds a base and three contributions."""
    put(s3, base, "base")
    put(s3, contributions, "contributions")
    return s3


def put(s3: S3, folder: Path, prefix: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.client().upload_file(str(path), s3.bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")


def connect(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next command find its store at `endpoint`, as a new process would."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    S3FileSystem.clear_instance_cache()


def get(s3: S3, key: str) -> bytes:
    data: bytes = s3.client().get_object(Bucket=s3.bucket, Key=key)["Body"].read()
    return data


def test_a_whole_round_in_a_bucket(s3: S3, suite: Path, coldctl: Run, tmp_path: Path) -> None:
    """Everything but the contributors' data and the settings lies in the store; the result is that of a disk."""
    here = tmp_path / "run"
    digests = []
    for run in (f"{s3.url}/run", str(here)):
        folder = f"{run}/iteration-001"
        commands: list[tuple[object, ...]] = [
            ("plan", run, "--config", suite, "--iterations", 1),
            ("finetune", "--suite", suite, "--base", run, "--output", run, "--jobs", 1),
            ("fuse", f"{folder}/contributions", "--base", run, "--output", f"{folder}/fused"),
            ("evaluate", f"{folder}/fused", "--suite", suite, "--output", f"{folder}/evaluation", "--jobs", 1),
            ("promote", run),
        ]
        for command in commands:
            ran = coldctl(*command)
            assert ran.code == 0, ran.stderr
            again = coldctl(*command) if command[0] != "promote" else ran
            assert again.code == 0, again.stderr
            if command[0] in ("finetune", "fuse", "evaluate"):
                assert "left alone" in again.stderr
        status = coldctl("status", run, "--json")
        assert status.json["base_model"] == f"{folder}/fused"
        assert status.json["iterations"][0]["contributions"] == ["green", "red"]
        digests.append(coldctl("lineage", run, "--json").json["lineage"][-1]["body_digest"])
    assert digests[0] == digests[1]
    keys = s3.names("run/")
    local = sorted(f"run/{path.relative_to(here).as_posix()}" for path in here.rglob("*") if path.is_file())
    extra = {key for key in keys if key not in local}
    assert {key.split("/")[1] for key in extra} <= {"pretrained", ".pretrained.digest"}, extra
    assert not set(local) - set(keys)
    for name in (
        "fused/model.safetensors",
        "fused/config.json",
        "evaluation/results.json",
        "contributions/red/model.safetensors",
    ):
        there = get(s3, f"run/iteration-001/{name}")
        if name.endswith("results.json"):
            assert json.loads(there)["averages"] == json.loads((here / "iteration-001" / name).read_text())["averages"]
        else:
            assert there == (here / "iteration-001" / name).read_bytes()
    places = [f"{s3.url}/run/iteration-001/contributions", f"{s3.url}/run/iteration-001/fused"]
    ran = coldctl("check", *places, "--deep", "--base", f"{s3.url}/run/pretrained")
    assert ran.code == 0, ran.stderr
    ran = coldctl("publish", f"{s3.url}/run", "--to", f"{s3.url}/published", "--license", "mit",
                  "--evaluation", f"{s3.url}/run/iteration-001/evaluation")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert "published/README.md" in s3.names("published/")


def test_fusing_stages_no_weights_on_this_machine(
    store: S3, coldctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("COLDCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "scratch").mkdir()
    before = set(tmp_path.rglob("*"))
    ran = coldctl("fuse", f"{store.url}/contributions", "--base", f"{store.url}/base", "--output", f"{store.url}/fused")
    assert ran.code == 0, ran.stderr
    assert set(tmp_path.rglob("*")) == before
    assert not [key for key in store.names() if "/." in key or key.startswith(".")]  # nothing unfinished is left


def test_what_fails_leaves_the_store_as_it_was(store: S3, coldctl: Run) -> None:
    store.client().put_object(Bucket=store.bucket, Key="contributions/two/model.safetensors", Body=b"not weights")
    before = store.names()
    ran = coldctl("fuse", f"{store.url}/contributions", "--base", f"{store.url}/base", "--output", f"{store.url}/fused")
    assert ran.code == 2
    assert "two" in ran.stderr
    assert store.names() == before


def test_two_writers_cannot_both_win(store: S3, coldctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one command writes, another one is told so; what died is taken over after its lease."""
    monkeypatch.setenv("COLDCTL_LEASE_SECONDS", "1.5")
    output = f"{store.url}/fused"
    fuse = ("fuse", f"{store.url}/contributions", "--base", f"{store.url}/base", "--output", output)
    from coldctl.storage.lease import Lease

    lease = Lease(locate(f"{store.url}/.fused.partial/.lease"), output)
    ran = coldctl(*fuse)
    assert ran.code == 2
    assert "being written by another command" in ran.stderr
    assert "fused/coldctl.json" not in store.names()
    lease._stopped.set()  # as if its process had died
    assert coldctl(*fuse).code == 0
    with pytest.raises(OutputError, match="taken over"):
        lease.check()
    lease.release()


def test_the_manifest_is_created_only_once(store: S3, coldctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that comes to its end after another one has completed the output changes nothing."""
    from coldctl.artifacts import store_output

    publish, output = store_output.publish, f"{store.url}/fused"

    def late(*arguments: object, **options: object) -> None:
        store.client().put_object(Bucket=store.bucket, Key="fused/coldctl.json", Body=b"{}")
        publish(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store_output, "publish", late)
    ran = coldctl("fuse", f"{store.url}/contributions", "--base", f"{store.url}/base", "--output", output)
    assert ran.code == 2
    assert "completed by another command" in ran.stderr
    assert get(store, "fused/coldctl.json") == b"{}"


def test_a_version_that_is_not_the_newest_is_noticed(s3: S3, tmp_path: Path) -> None:
    """If-None-Match and If-Match, by the store itself and on a disk alike."""
    for folder in (locate(s3.url), tmp_path, locate("memory://conditional")):
        path = folder / "run.json"
        assert conditional_write.read(path) is None
        assert conditional_write.create(path, b"one")
        assert not conditional_write.create(path, b"two")
        first = conditional_write.read(path)
        assert first is not None
        assert conditional_write.replace(path, b"two", first)
        assert not conditional_write.replace(path, b"three", first)
        second = conditional_write.read(path)
        assert second is not None
        assert second.data == b"two"
        path.unlink()
        assert not conditional_write.replace(path, b"four", second)


def test_decisions_are_not_written_over(s3: S3, suite: Path, coldctl: Run) -> None:
    """Two commands that change `run.json` at once: the slower one is told to come again."""
    from coldctl.artifacts import run as runs

    run = f"{s3.url}/run"
    assert coldctl("plan", run, "--config", suite, "--iterations", 1).code == 0
    mine = runs.read(locate(run))
    runs.write(replace(runs.read(locate(run)), target=3))
    with pytest.raises(OutputError, match="changed by another command"):
        runs.write(replace(mine, target=2))
    assert runs.read(locate(run)).target == 3


@pytest.mark.parametrize("fault", ["refuse", "drop", "short", "slow"])
def test_requests_that_fail_are_tried_again(
    store: S3, coldctl: Run, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldctl.storage.remote._PAUSES", (0.05,) * 6)
    monkeypatch.setenv("AWS_RETRY_MODE", "standard")  # the store's library would wait long before we try again
    fuse = ("fuse", f"{store.url}/contributions", "--base", f"{store.url}/base", "--output")
    assert coldctl(*fuse, f"{store.url}/reliable").code == 0
    with unreliable(store.endpoint, Faults(**{fault: 0.08}, seed=7)) as (endpoint, counted):
        connect(endpoint, monkeypatch)
        ran = coldctl(*fuse, f"{store.url}/unreliable")
        assert ran.code == 0, ran.stderr
    assert counted[fault] > 0
    assert get(store, f"unreliable/{WEIGHTS}") == get(store, f"reliable/{WEIGHTS}")


def test_a_store_that_does_not_answer_is_an_error_in_words(
    store: S3, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldctl.storage.remote._PAUSES", (0.01, 0.01))
    with unreliable(store.endpoint, Faults(refuse=1.0)) as (endpoint, _):
        connect(endpoint, monkeypatch)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        ran = coldctl("check", f"{store.url}/contributions")
    assert ran.code == 2
    assert "Traceback" not in ran.stderr
    assert store.bucket in ran.stderr
    assert "check the URL" in ran.stderr


def test_an_input_that_changes_while_it_is_read_is_noticed(
    store: S3, coldctl: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plain checkpoint has no digest that would tell: its version in the store does."""
    from coldctl.fusing import writer as writing

    store.client().delete_object(Bucket=store.bucket, Key="contributions/one/coldctl.json")
    write = writing.write

    def meddle(*arguments: object, **options: object) -> object:
        key = "contributions/one/config.json"
        store.client().put_object(Bucket=store.bucket, Key=key, Body=get(store, key) + b"\n")
        return write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("coldctl.fusing.fusion.write", meddle)
    ran = coldctl("fuse", f"{store.url}/contributions", "--base", f"{store.url}/base", "--output", tmp_path / "fused")
    assert ran.code == 2
    assert "contributions/one: config.json changed while it was read" in ran.stderr
    assert not (tmp_path / "fused").exists()


def test_a_killed_writer_is_taken_over(store: S3, coldctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle leaves a lease and half an output; the same command completes it."""
    monkeypatch.setenv("COLDCTL_LEASE_SECONDS", "1")
    output = f"{store.url}/fused"
    fuse = ["fuse", f"{store.url}/contributions", "--base", f"{store.url}/base", "--output", output]
    command = [sys.executable, "-m", "coldctl", *fuse]
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not store.names(".fused.partial/") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ran = coldctl(*fuse)
    assert ran.code == 0, ran.stderr
    assert coldctl("check", output, "--deep").code == 0
    assert not store.names(".fused.partial/")


def test_finetuning_into_a_store_goes_on_where_it_was(
    store: S3, dataset: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contribution is trained here and stored at the end; when storing fails, the training is not lost."""
    train = ("finetune", dataset, "--base", f"{store.url}/base", "--output", f"{store.url}/mine", *FAST, "--json")
    with unreliable(store.endpoint, Faults(refuse_writes=1.0)) as (endpoint, _):
        connect(endpoint, monkeypatch)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        ran = coldctl(*train)
        assert ran.code == 2, ran.stderr
    assert not store.names("mine/")
    connect(store.endpoint, monkeypatch)
    ran = coldctl(*train)
    assert ran.code == 0, ran.stderr
    assert coldctl("check", f"{store.url}/mine", "--base", f"{store.url}/base", "--deep").code == 0


def test_finished_by_another_while_it_was_worked_on(tmp_path: Path) -> None:
    """Of two that make the same, one stores it; of two that make different ones, the second is told."""
    place = locate("memory://meanwhile/out")
    document: manifest.Manifest = {"kind": "fused", "name": "m", "body_digest": "x", "identity": "same"}
    with output.local_workdir(place, "same", overwrite=False) as here:
        manifest.write(here, document)
        with output.atomic_output(place, "same", overwrite=False) as partial:
            manifest.write(partial, document)
        stored = (place / layout.MANIFEST).read_bytes()
    assert not here.exists()
    assert (place / layout.MANIFEST).read_bytes() == stored


class Rival(MemoryFileSystem):  # type: ignore[misc]
    """A store in which another writer completes the output while ours is copied, or whose connections break."""

    protocol = "rival"
    breaks = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("rival://", "memory://")))

    def cp_file(self, source: str, target: str, **options: object) -> None:
        super().cp_file(source, target, **options)
        self.pipe_file(f"{target.rpartition('/')[0]}/coldctl.json", b"theirs")

    def put_file(self, *arguments: object, **options: object) -> None:
        self._break()
        super().put_file(*arguments, **options)

    def _open(self, path: str, mode: str = "rb", **options: object) -> object:
        if mode == "wb" and path.endswith(WEIGHTS):
            self._break()
        return super()._open(path, mode, **options)

    def _break(self) -> None:
        if Rival.breaks:
            raise ConnectionResetError("the connection was reset")


def test_rivals_and_broken_connections(base: Path, contributions: Path, dataset: Path, coldctl: Run) -> None:
    fsspec.register_implementation("rival", Rival, clobber=True)
    ran = coldctl("fuse", contributions, "--base", base, "--output", "rival://rivals/fused")
    assert ran.code == 2
    assert "was completed by another command at the same time" in ran.stderr
    assert fsspec.filesystem("rival").cat("/rivals/fused/coldctl.json") == b"theirs"
    Rival.breaks = True
    train = ("finetune", dataset, "--base", base, "--output", "rival://rivals/mine", *FAST, "--jobs", 1)
    fuse = ("fuse", contributions, "--base", base, "--output", "rival://rivals/second")
    for command in (train, fuse):
        ran = coldctl(*command)
        assert ran.code == 2
        assert "the connection was reset" in ran.stderr
        assert "run the same command again" in ran.stderr
    assert not fsspec.filesystem("rival").glob("/rivals/second/*")


def test_an_interrupted_copy_is_gone_on_with(base: Path, contributions: Path, coldctl: Run) -> None:
    """Files that were copied already are ours if the marker beside them says so."""
    store = fsspec.filesystem("memory")
    fuse = ("fuse", contributions, "--base", base, "--output", "memory://copied/fused")
    store.pipe("/copied/fused/config.json", b"half")
    ran = coldctl(*fuse)
    assert ran.code == 2
    assert "did not write" in ran.stderr
    store.pipe("/copied/.fused.partial/.identity", b"")
    assert coldctl(*fuse).code == 0
    assert coldctl("check", "memory://copied/fused", "--deep").code == 0
    assert not store.exists("/copied/.fused.partial")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (FileNotFoundError(), "is missing: it was removed, or never stored"),
        (PermissionError("denied"), "denied: check your credentials"),
        (b"", "bytes came: try again later"),
    ],
)
def test_answers_of_a_store_in_words(
    answer: Exception | bytes, words: str, base: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(base), "/answers/base", recursive=True)

    def cat_file(*_: object, **__: object) -> bytes:
        if isinstance(answer, bytes):
            return answer
        raise answer

    monkeypatch.setattr("coldctl.storage.remote._PAUSES", (0.0,))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    ran = coldctl("check", "memory://answers/base", "--json")
    assert ran.code == 3
    assert words in ran.stdout


def test_status_tells_who_is_at_work(tmp_path: Path, suite: Path, coldctl: Run) -> None:
    """On a disk a lock says so, in a store a lease."""
    for place in (str(tmp_path / "run"), "memory://at-work/run"):
        assert coldctl("plan", place, "--config", suite).code == 0
        folder = locate(f"{place}/iteration-001/contributions")
        for name in ("busy", "dead"):
            (folder / f".{name}.partial").mkdir(parents=True)
            (folder / f".{name}.partial" / layout.IDENTITY).write_text("x")
        busy = folder / ".busy.partial"
        lock = os.open(busy, os.O_RDONLY) if isinstance(busy, Path) else None
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        else:
            (busy / layout.LEASE).write_text("x")
        status = coldctl("status", place, "--json").json["iterations"][0]
        assert (status["running"], status["unfinished"]) == (["busy"], ["dead"]), status
        if lock is not None:
            os.close(lock)


@pytest.mark.parametrize("place", ["here", "s3"])
def test_files_of_weights_hold_what_was_written(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty tensors, a disk that is told to begin early, a file that is given up, and one that lacks bytes."""
    monkeypatch.setattr(weights, "_WRITE_BACK", 64)
    folder = locate(str(tmp_path) if place == "here" else request.getfixturevalue("s3").url)
    shapes = {"a": (64,), "b": (0, 3), "c": (0,)}
    layouts = weights.file_order([weights.Layout(name, "F32", shape) for name, shape in shapes.items()])
    data = np.arange(64, dtype=np.float32)

    def writer(limit: int = 1 << 30) -> weights.WeightsWriter:
        return weights.WeightsWriter(folder, layouts, limit)

    for limit, files in ((1 << 30, 1), (100, 2)):  # the empty ones in a file of their own
        whole = writer(limit)
        for piece in (data[:40], data[40:], data[:0]):
            whole.write(piece.view(np.uint8).data)
        whole.close()
        assert len(whole.digests) == files
        found: dict[str, Any] = {}
        for name, digest in whole.digests.items():
            content = (folder / name).read_bytes()
            assert digest == "sha256:" + hashlib.sha256(content).hexdigest()
            found |= safetensors.numpy.load(content)
        assert {name: array.shape for name, array in found.items()} == shapes
        assert np.array_equal(found["a"], data)
    (folder / layout.WEIGHTS).unlink()
    half = writer()
    half.write(data[:40].view(np.uint8).data)
    with pytest.raises(ValueError, match=r"96 bytes of model\.safetensors were never written"):
        half.close()
    half.abandon()
    half.abandon()
    assert (place == "here") == (folder / layout.WEIGHTS).exists()  # no store shows what is not whole


@pytest.mark.parametrize("place", ["here", "memory://folders/base"])
def test_a_folder_gives_what_it_has_and_nothing_else(place: str, tmp_path: Path, base: Path) -> None:
    """On a disk as in a store."""
    fsspec.filesystem("memory").put(str(base), "/folders/base", recursive=True)
    folder = open_folder(str(shutil.copytree(base, tmp_path / "base")) if place == "here" else place)
    expected, size = (base / WEIGHTS).read_bytes(), (base / WEIGHTS).stat().st_size
    assert size > 1000
    for _ in range(2):  # the second time from what was kept
        assert folder.read("config.json") == (base / "config.json").read_bytes()
        assert folder.read(WEIGHTS) == expected
        for name in (WEIGHTS, "config.json"):
            reader = folder.open(name)
            with pytest.raises(CheckpointError, match="it is truncated"):
                reader.read_into(reader.size - 3, memoryview(bytearray(4)))
            reader.close()
    for name, words in (("../base/config.json", "points outside the directory"), ("none", "cannot read .*none")):
        with pytest.raises(CheckpointError, match=words):
            folder.read(name)
    with pytest.raises(CheckpointError, match="is larger than"):
        folder.read(WEIGHTS, 1000)


def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.pipe({"/large/a.json": b"a" * (2 << 20), "/large/b.json": b"b"})
    folder, asked = open_folder("memory://large"), []
    cat_file = MemoryFileSystem.cat_file

    def counted(self: MemoryFileSystem, path: str, **options: object) -> object:
        asked.append(path)
        return cat_file(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    for _ in range(3):
        assert folder.read("a.json") == b"a" * (2 << 20)
        assert folder.read("b.json") == b"b"
    assert asked.count("/large/b.json") == 1
    assert asked.count("/large/a.json") >= 1
