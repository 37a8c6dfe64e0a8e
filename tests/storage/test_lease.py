"""Small files and copies that several processes agree about: leases, conditional writes, models fetched from a store."""

import itertools
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from coldctl.artifacts.model_ref import Model
from coldctl.common.errors import BusyError, OutputError
from coldctl.storage import conditional_write, user_cache
from coldctl.storage import lease as leases
from coldctl.storage.lease import Lease
from coldctl.storage.location import locate
from helpers.s3_server import S3
from helpers.unreliable import Faults, unreliable

WEIGHTS = "model.safetensors"


class Crowded(MemoryFileSystem):  # type: ignore[misc]
    """A store in which others write all the time, or right after oneself, or that refuses."""

    protocol = "crowded"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    versions = itertools.count()
    behaviour = "changes"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("crowded://", "memory://")))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if Crowded.behaviour == "refuses":
            raise PermissionError("not yours")
        return {**super().info(path, **options), "ETag": f"{next(self.versions) * (Crowded.behaviour == 'changes')}"}

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        super().pipe_file(path, value, **options)
        if Crowded.behaviour == "overwrites":
            super().pipe_file(path, b'{"holder": "another"}')


def test_a_file_that_changes_all_the_time_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("crowded", Crowded, clobber=True)
    path = locate("crowded://store/run.json")
    assert conditional_write.read(path) is None
    assert conditional_write.create(path, b"one")
    with pytest.raises(OutputError, match="changes faster than it can be read: run the same command again"):
        conditional_write.read(path)
    monkeypatch.setattr(Crowded, "behaviour", "refuses")
    with pytest.raises(OutputError, match=r"run\.json.*not yours"):
        conditional_write.read(path)
    monkeypatch.setattr(Crowded, "behaviour", "overwrites")
    with pytest.raises(BusyError, match="out was taken by another command at the same moment: wait for it"):
        Lease(locate("crowded://store/.lease"), "out")


def test_a_store_that_refuses_a_change_is_told_from_one_that_was_quicker(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = locate(f"{s3.url}/run.json")
    assert conditional_write.create(path, b"one")
    with unreliable(s3.endpoint, Faults(refuse_writes=1.0)) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        path = locate(f"{s3.url}/run.json")
        version = conditional_write.read(path)
        assert version is not None
        with pytest.raises(OutputError, match=r"run\.json"):
            conditional_write.replace(path, b"two", version)
        with pytest.raises(OutputError, match=r"other\.json"):
            conditional_write.create(locate(f"{s3.url}/other.json"), b"two")
        assert conditional_write.read(path) == version


def test_a_lease_is_renewed_lost_and_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDCTL_LEASE_SECONDS", "soon")
    assert leases.seconds() == 30
    path = tmp_path / ".lease"
    lease = Lease(path, "out")
    before = path.read_bytes()
    lease.check_age()
    assert path.read_bytes() == before
    lease._renewed_at -= 60  # as if the thread had been held up
    lease.check_age()
    assert path.read_bytes() != before
    with monkeypatch.context() as patched:  # it is let go of while another one waits to see whether it lives
        patched.setattr(time, "sleep", lambda _: lease.release())
        heir = Lease(path, "out")
    heir.check()
    link = os.link

    def link_late(source: Path, target: Path) -> None:
        try:
            link(source, target)
        except FileExistsError:
            heir.release()
            raise

    with monkeypatch.context() as patched:  # or just before one looks at it
        patched.setattr(os, "link", link_late)
        third = Lease(path, "out")
    third.release()
    assert not path.exists()
    monkeypatch.setenv("COLDCTL_LEASE_SECONDS", "0.1")
    lost = Lease(path, "out")
    lost._version = replace(lost._version, data=b"theirs")
    lost._thread.join(timeout=30)
    assert not lost._thread.is_alive()
    with pytest.raises(OutputError, match="out was taken over by another command"):
        lost.check()


def test_a_lease_outlives_a_moment_without_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDCTL_LEASE_SECONDS", "0.1")
    folder = tmp_path / "store"
    folder.mkdir()
    lease = Lease(folder / ".lease", "out")
    folder.rename(tmp_path / "away")
    with pytest.raises(OutputError, match=r"cannot write .*\.lease: No such file"):
        lease.check()
    beats, end = lease._beats, time.monotonic() + 30
    while lease._beats < beats + 2 and time.monotonic() < end:  # the thread has tried, too
        lease._thread.join(timeout=0.01)
    (tmp_path / "away").rename(folder)
    lease.check()
    lease.release()
    assert not list(folder.iterdir())


def test_models_of_a_store_are_fetched_once_and_again_where_the_copy_is_not_whole(
    base: Path, contributions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLDCTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for folder in (base, contributions / "one"):
        memory.put(str(folder), f"/cached/{folder.name}", recursive=True)
    place = Model("one", "memory://cached/one").local()
    assert place.parent == tmp_path / "coldctl" / "models"
    whole = (place / WEIGHTS).read_bytes()
    assert whole == (contributions / "one" / WEIGHTS).read_bytes()
    for name, damaged in ((WEIGHTS, whole[:-1]), ("coldctl.json", b"{}")):
        (place / name).write_bytes(damaged)
        assert Model("one", "memory://cached/one").local() == place
        assert (place / name).read_bytes() == (contributions / "one" / name).read_bytes()
    # The least recently used copy makes place for another, unless a command may be reading it.
    size = sum(path.stat().st_size for path in base.rglob("*"))
    monkeypatch.setattr(user_cache, "LIMIT", size)
    (place / "more").write_bytes(bytes(size))
    kept = Model("tiny-bert", "memory://cached/tiny-bert").local()
    assert sorted(place.parent.iterdir()) == sorted([place, kept])
    shutil.rmtree(kept)
    os.utime(place, (0, 0))
    other = Model("tiny-bert", "memory://cached/tiny-bert").local()
    assert list(place.parent.iterdir()) == [other]
    memory.rm("/cached", recursive=True)
