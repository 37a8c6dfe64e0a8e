"""A RUN in a bucket: contributors join it, watchers make its iterations, each of them once, and late ones are found there."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from coldctl.storage.lease import Lease
from conftest import FAST, suite_text
from helpers import tiny
from helpers.offers import offer
from helpers.s3_server import S3
from helpers.trail import Run


class Bucket:
    """A RUN in a bucket, with local copies of its bases to make contributions from."""

    def __init__(self, s3: S3, folder: Path, base: Path, coldctl: Run) -> None:
        shutil.copytree(base, folder / "base")
        (folder / "suite.toml").write_text(suite_text("base"))
        self.s3, self.folder, self.coldctl = s3, folder, coldctl
        self.run = f"{s3.url}/run"
        ran = coldctl("plan", self.run, "--config", folder / "suite.toml")
        assert ran.code == 0, ran.stderr
        self.bases = [folder / "base"]

    def give(self, number: int, name: str, *, seed: int, base: int | None = None) -> None:
        """Put a contribution there as another program would: its manifest last."""
        place = offer(self.bases[(base or number) - 1], self.folder / f"given-{number}" / name, seed=seed)
        files = sorted(place.iterdir(), key=lambda path: path.name == "coldctl.json")
        for path in files:
            key = f"run/iteration-{number:03d}/contributions/{name}/{path.name}"
            self.s3.client().upload_file(str(path), self.s3.bucket, key)

    def read(self, key: str) -> Any:
        return json.loads(self.s3.client().get_object(Bucket=self.s3.bucket, Key=f"run/{key}")["Body"].read())

    def fetch(self, number: int) -> None:
        """Copy an iteration's fused model, which the next contributions are made from."""
        place = self.folder / f"iteration-{number:03d}" / "fused"
        place.mkdir(parents=True)
        for key in self.s3.names(f"run/iteration-{number:03d}/fused/"):
            self.s3.client().download_file(self.s3.bucket, key, str(place / key.rpartition("/")[2]))
        self.bases.append(place)


@pytest.fixture
def bucket(s3: S3, tmp_path: Path, base: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv("COLDCTL_LEASE_SECONDS", "2")
    return Bucket(s3, tmp_path, base, coldctl)


def test_joining_and_watching_in_a_bucket(bucket: Bucket, tmp_path: Path, coldctl: Run) -> None:
    mine = tiny.make_dataset(tmp_path / "mine", seed=7)
    join = ("finetune", mine, "--base", bucket.run, "--output", bucket.run, "--name", "guest", *FAST, "--jobs", 1)
    watch = ("watch", bucket.run, "--min-contributions", 2, "--once")
    ran = coldctl(*join)
    assert ran.code == 0, ran.stderr
    assert "1 of 2 contributions have come" in coldctl(*watch).stderr
    bucket.give(1, "a", seed=1)
    contributions, fused = f"{bucket.run}/iteration-001/contributions", f"{bucket.run}/iteration-001/fused"
    assert coldctl("fuse", contributions, "--base", bucket.run, "--output", fused).code == 0
    ran = coldctl(*join[:-1], 1, "--epochs", 2)  # the name counts once
    assert ran.code == 2
    assert "or another --name if it is another contributor's" in ran.stderr
    ran = coldctl(*(part if part != "guest" else "later" for part in join))  # between fuse and promote
    assert ran.code == 0, ran.stderr
    assert "is fused already: a later one takes later as a late contribution" in ran.stderr
    ran = coldctl(*watch)
    assert ran.code == 0, ran.stderr
    assert "iteration 1 is fused and promoted" in ran.stderr
    bucket.fetch(1)
    bucket.give(2, "b", seed=2)
    status = coldctl("status", bucket.run, "--json").json
    assert status["waiting"] == ["later-iteration-001"]
    ran = coldctl(*watch)
    assert ran.code == 0, ran.stderr
    records = {item["name"]: item for item in bucket.read("iteration-002/fused/coldctl.json")["contributions"]}
    assert {name: item["age"] for name, item in records.items()} == {"b": 0, "later-iteration-001": 1}
    assert all(item["verified"] and item["status"] == "fused" for item in records.values())
    here = tmp_path / "here"
    for name in ("contributions/b", "contributions/later"):
        number = "002" if name.endswith("b") else "001"
        for key in bucket.s3.names(f"run/iteration-{number}/{name}/"):
            target = here / f"iteration-{number}" / name / key.rpartition("/")[2]
            target.parent.mkdir(parents=True, exist_ok=True)
            bucket.s3.client().download_file(bucket.s3.bucket, key, str(target))
    given = (here / "iteration-002/contributions/b", here / "iteration-001/contributions/later")
    ran = coldctl("fuse", *given, "--base", bucket.bases[1], "--output", tmp_path / "out", "--stale", "discount",
                  "--old-base", bucket.bases[0], "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert ran.json["body_digest"] == bucket.read("iteration-002/fused/coldctl.json")["body_digest"]


def test_what_is_being_put_into_a_bucket_is_not_taken(bucket: Bucket, coldctl: Run) -> None:
    bucket.give(1, "a", seed=1)
    bucket.give(1, "b", seed=2)
    bucket.give(1, "c", seed=3)
    contributions = "run/iteration-001/contributions"
    client = bucket.s3.client()
    client.put_object(Bucket=bucket.s3.bucket, Key=f"{contributions}/.b.partial/.identity", Body=b"")
    for name in ("b", "c"):  # one by coldctl, one by another program
        client.delete_object(Bucket=bucket.s3.bucket, Key=f"{contributions}/{name}/coldctl.json")
    ran = coldctl("watch", bucket.run, "--min-contributions", 1, "--once")
    assert ran.code == 0, ran.stderr
    listed = bucket.read("iteration-001/fused/coldctl.json")["contributions"]
    assert [item["name"] for item in listed] == ["a"]


def test_two_watchers_of_a_bucket_make_each_iteration_once(bucket: Bucket) -> None:
    flags = ("--min-contributions", 2, "--every", "0.3s", "--iterations", 2)
    command = [sys.executable, "-m", "coldctl", "watch", bucket.run, *map(str, flags)]
    watchers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for number in (1, 2):
        bucket.give(number, "a", seed=number)
        bucket.give(1, f"guest-{number}", seed=10 + number)
        deadline = time.monotonic() + 180
        while len(bucket.read("run.json")["iterations"]) < number:
            assert time.monotonic() < deadline
            assert any(watcher.poll() is None for watcher in watchers), [item.communicate()[1] for item in watchers]
            time.sleep(0.2)
        bucket.fetch(number)
    said = [watcher.communicate(timeout=60)[1] for watcher in watchers]
    assert [watcher.returncode for watcher in watchers] == [0, 0], said
    decided = bucket.read("run.json")["iterations"]
    assert [item["number"] for item in decided] == [1, 2]
    counted = []
    for item in decided:
        document = bucket.read(f"iteration-{item['number']:03d}/fused/coldctl.json")
        assert document["body_digest"] == item["body_digest"]
        counted += [record["name"] for record in document["contributions"]]
    assert sorted(counted) == ["a", "a", "guest-1", "guest-2-iteration-001"]
    assert not [name for name in bucket.s3.names("run/") if ".partial/" in name]


def test_what_another_fuses_meanwhile_is_not_replaced(
    suite: Path, contributions: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at an iteration in a store and the hold on it, another command may complete it."""
    store, run = fsspec.filesystem("memory"), "memory://once/run"
    assert coldctl("plan", run, "--config", suite).code == 0
    folder = "once/run/iteration-001"
    store.put(str(contributions), f"/{folder}/contributions", recursive=True)

    def meanwhile(*arguments: Any) -> Any:
        store.pipe(f"/{folder}/fused/coldctl.json", b"{}")
        return Lease(*arguments)

    monkeypatch.setattr("coldctl.artifacts.store_output.Lease", meanwhile)
    fuse = ("fuse", f"memory://{folder}/contributions", "--base", run, "--output", f"memory://{folder}/fused")
    watch = ("watch", run, "--once", "--min-contributions", 2)
    for command, code in ((fuse, 2), (watch, 0)):
        ran = coldctl(*command)
        assert ran.code == code, ran.stderr
        assert "completed by another command" in ran.stderr
        assert store.cat(f"/{folder}/fused/coldctl.json") == b"{}"
        store.rm(f"/{folder}/fused", recursive=True)
