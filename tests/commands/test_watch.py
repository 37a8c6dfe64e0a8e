"""`coldctl watch`: iterations made as contributions come, by one of several watchers, killed and started again."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Ran
from helpers import tiny
from helpers.bodies import poison
from helpers.offers import offer
from helpers.trail import Run, Trail, flip


@pytest.fixture
def trail(tmp_path: Path, base: Path, coldctl: Run) -> Trail:
    return Trail(tmp_path, base, coldctl)


def look(trail: Trail, least: int, *flags: object) -> Ran:
    return trail.coldctl("watch", trail.run, "--min-contributions", least, "--once", *flags)


def start(trail: Trail, *flags: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "coldctl", "watch", trail.run, *flags]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], *watchers: "subprocess.Popen[str]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert any(watcher.poll() is None for watcher in watchers)
        time.sleep(0.02)


def decided(trail: Trail) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((trail.run / "run.json").read_text())["iterations"]
    return found


def test_what_it_needs(tmp_path: Path, trail: Trail) -> None:
    ran = trail.coldctl("watch", tmp_path, "--min-contributions", 2, "--once")
    assert ran.code == 2
    assert "start one with `coldctl plan`" in ran.stderr
    ran = trail.coldctl("watch", trail.run, "--once")
    assert ran.code == 2
    assert "--min-contributions" in ran.stderr
    assert "write for example 30s" in look(trail, 2, "--every", "often").stderr
    trail.coldctl("plan", trail.run, "--config", tmp_path / "suite.toml", "--gate")
    ran = look(trail, 2)
    assert ran.code == 2
    assert "has a gate, which needs an evaluation: give --suite" in ran.stderr


def test_one_look_does_what_can_be_done(trail: Trail) -> None:
    assert "0 of 2 contributions have come" in look(trail, 2).stderr
    trail.give(1, "a", seed=1)
    (trail.iteration(1) / "contributions" / ".b.partial").mkdir()
    ran = look(trail, 2, "--json")
    assert ran.code == 0
    assert [(item["state"], item["usable"]) for item in ran.json["looks"]] == [("waiting", 1)]
    trail.give(1, "b", seed=2)
    ran = look(trail, 2)
    assert ran.code == 0, ran.stderr
    assert "iteration 1 is fused and promoted" in ran.stderr
    trail.bases.append(trail.iteration(1) / "fused")
    trail.give(1, "late", seed=3)
    assert "1 of 2 contributions have come" in look(trail, 2).stderr
    trail.give(2, "a", seed=4)
    assert look(trail, 2).code == 0
    assert [item["promoted"] for item in decided(trail)] == [True, True]
    status = trail.coldctl("status", trail.run, "--json").json
    assert status["iterations"][1]["late"] == {"late-iteration-001": 1}


def test_bad_contributions_stop_nobody(trail: Trail, tmp_path: Path) -> None:
    flip(trail.give(1, "changed", seed=1) / "model.safetensors")
    stranger = tiny.perturb(trail.bases[0], tmp_path / "elsewhere", seed=8)
    offer(stranger, trail.iteration(1) / "contributions" / "stranger", seed=2)
    poisoned = poison(trail.bases[0], tmp_path / "poisoned", np.nan)
    offer(poisoned, trail.iteration(1) / "contributions" / "poisoned", seed=3)
    (trail.give(1, "torn", seed=6) / "model.safetensors").write_bytes(b"half")
    trail.give(1, "good", seed=4)
    assert "only 1 of 5 contributions can be fused, 2 are needed" in look(trail, 2).stderr
    assert decided(trail) == []
    trail.give(1, "better", seed=5)
    ran = look(trail, 2, "--json")
    assert ran.code == 0, ran.stderr
    records = {item["name"]: item for item in ran.json["looks"][0]["fused"]["contributions"]}
    assert {name for name, item in records.items() if item["status"] == "fused"} == {"good", "better"}
    assert all(records[name]["reason"] for name in ("changed", "stranger", "poisoned", "torn"))


def test_a_file_may_ask_for_a_stop_at_bad_contributions(trail: Trail, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('[fuse]\nscreen = "report"\nmin_contributions = 1\n')
    bad = trail.give(1, "bad", seed=1)
    flip(bad / "model.safetensors")
    trail.give(1, "good", seed=2)
    for _ in range(2):
        ran = trail.coldctl("watch", trail.run, "--config", settings, "--once")
        assert ran.code == 0
        assert "1 of 2 contributions cannot be fused" in ran.stderr
    shutil.rmtree(bad)
    assert "promoted" in trail.coldctl("watch", trail.run, "--config", settings, "--once").stderr


def test_two_watchers_make_each_iteration_once(trail: Trail) -> None:
    watchers = [start(trail, "--min-contributions", 2, "--every", "0.2s", "--iterations", 3) for _ in range(2)]
    stamps = []
    for number in (1, 2, 3):
        trail.give(number, "a", seed=number)
        if number > 1:
            trail.give(number - 1, "late", seed=10 + number)
        else:
            trail.give(number, "b", seed=20)
        until(lambda number=number: len(decided(trail)) == number, *watchers)  # type: ignore[misc]
        fused = trail.iteration(number) / "fused"
        stamps.append((fused / "coldctl.json", (fused / "coldctl.json").stat().st_mtime_ns))
        trail.bases.append(fused)
    said = [watcher.communicate(timeout=60)[1] for watcher in watchers]
    assert [watcher.returncode for watcher in watchers] == [0, 0], said
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps)
    assert [item["number"] for item in decided(trail)] == [1, 2, 3]
    for entry, (path, _) in zip(decided(trail), stamps, strict=True):
        assert json.loads(path.read_text())["body_digest"] == entry["body_digest"]
    counted = [item["name"] for path, _ in stamps for item in json.loads(path.read_text())["contributions"]]
    assert sorted(counted) == ["a", "a", "a", "b", "late-iteration-001", "late-iteration-002"]


def test_killed_it_goes_on_where_it_was(trail: Trail, tmp_path: Path) -> None:
    """After fusing, before the decision; and with what a fuse leaves that was killed itself."""
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    trail.give(1, "a", seed=1)
    left = trail.iteration(1) / ".fused.partial"
    left.mkdir()
    (left / ".identity").write_text("")
    (left / "model.safetensors").write_bytes(b"half of it")
    suite = ("--suite", tmp_path / "suite.toml", "--jobs", 1)
    watcher = start(trail, "--min-contributions", 1, "--every", "0.2s", *suite)
    fused = trail.iteration(1) / "fused" / "coldctl.json"
    until(fused.exists, watcher)
    watcher.send_signal(signal.SIGKILL)
    watcher.communicate()
    assert decided(trail) == []
    stamp = fused.stat().st_mtime_ns
    trail.give(1, "late", seed=2)
    ran = look(trail, 1, *suite, "--json")
    assert ran.code == 0, ran.stderr
    assert fused.stat().st_mtime_ns == stamp
    assert [item["promoted"] for item in decided(trail)] == [True]
    assert (trail.iteration(1) / "evaluation" / "coldctl.json").exists()
    assert ran.json["looks"][0]["results"]["averages"]
    trail.bases.append(fused.parent)
    document = json.loads((trail.run / "run.json").read_text())
    (trail.run / "run.json").write_text(json.dumps({**document, "gate": True}))
    ran = look(trail, 1, *suite)  # the late one makes iteration 2
    assert ran.code == 0, ran.stderr
    assert (trail.iteration(2) / "gate" / "coldctl.json").exists()
    assert len(decided(trail)) == 2


def test_an_interrupted_wait_says_how_to_go_on(trail: Trail) -> None:
    watcher = start(trail, "--min-contributions", 1)
    assert watcher.stderr is not None
    assert "0 of 1 contributions have come" in watcher.stderr.readline()
    watcher.send_signal(signal.SIGINT)
    assert "run the same command again" in watcher.communicate(timeout=60)[1]
    assert watcher.returncode == 130
