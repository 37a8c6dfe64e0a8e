"""Contributors who point at a RUN: whenever they come, what they make is put where it belongs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import FAST, Ran
from helpers import tiny
from helpers.trail import Run, Trail

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trail(tmp_path: Path, base: Path, coldctl: Run) -> Trail:
    return Trail(tmp_path, base, coldctl)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tiny.make_dataset(tmp_path / "mine", seed=7)


def join(trail: Trail, data: Path, *flags: object) -> Ran:
    return trail.coldctl("finetune", data, "--base", trail.run, "--output", trail.run, *FAST, "--jobs", 1, *flags)


def manifest(place: Path) -> Any:
    return json.loads((place / "coldctl.json").read_text())


def test_the_documents_commands_run(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run) -> None:
    text = (ROOT / "docs/collaborating.md").read_text().split("```sh\n")[1].split("```")[0]
    shutil.copytree(base, tmp_path / "assets/demo/base")
    tiny.make_dataset(tmp_path / "assets/demo/tweets", train=240)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for line in text.strip().splitlines():
        ran = coldctl(*line.split()[1:])
        assert ran.code == 0, (line, ran.stderr)
    assert "iteration 1 is fused and promoted" in ran.stderr


def test_between_fuse_and_promote(trail: Trail, mine: Path) -> None:
    """It goes to the iteration whose base it was made on, and the next fuse finds it there."""
    trail.give(1, "a", seed=1)
    assert trail.fuse(1).code == 0
    ran = join(trail, mine, "--name", "guest")
    assert ran.code == 0, ran.stderr
    assert "iteration 1 is fused already: a later one takes guest as a late contribution" in ran.stderr
    guest = trail.iteration(1) / "contributions" / "guest"
    assert manifest(guest)["iteration"] == 1
    assert "left alone" in trail.fuse(1).stderr
    trail.go_on(1)
    ran = join(trail, mine, "--name", "guest")
    assert ran.code == 0, ran.stderr
    newer = trail.iteration(2) / "contributions" / "guest"
    assert manifest(newer)["base"]["body_digest"] == manifest(trail.bases[1])["body_digest"]
    second = trail.go_on(2)
    assert {name: item["age"] for name, item in second.items()} == {"guest": 0, "guest-iteration-001": 1}


def test_with_a_gate_the_newest_iteration_of_a_base_is_meant(trail: Trail, mine: Path) -> None:
    document = json.loads((trail.run / "run.json").read_text())
    document["iterations"] = [{"number": 1, "promoted": False, "body_digest": "sha256:0", "reason": "worse"}]
    (trail.run / "run.json").write_text(json.dumps(document))
    assert join(trail, mine, "--name", "guest").code == 0
    assert manifest(trail.iteration(2) / "contributions" / "guest")["iteration"] == 2


def test_anothers_contribution_is_not_replaced(trail: Trail, mine: Path, tmp_path: Path) -> None:
    assert join(trail, mine, "--name", "guest").code == 0
    guest = trail.iteration(1) / "contributions" / "guest"
    before = manifest(guest)
    assert "left alone" in join(trail, mine, "--name", "guest").stderr
    other = tiny.make_dataset(tmp_path / "other", seed=8)
    ran = join(trail, other, "--name", "guest")
    assert ran.code == 2
    assert "or another --name if it is another contributor's" in ran.stderr
    assert manifest(guest) == before
    assert join(trail, other, "--name", "guest", "--overwrite").code == 0
    assert manifest(guest) != before
    assert trail.fuse(1).code == 0
    ran = join(trail, mine, "--name", "guest", "--overwrite")
    assert ran.code == 2
    assert "has been fused already" in ran.stderr


def test_interrupted_training_goes_on_with_the_base_it_began_with(trail: Trail, mine: Path, tmp_path: Path) -> None:
    trail.give(1, "a", seed=1)
    slow = ("--epochs", 3, "--batch-size", 4)
    command = ("finetune", mine, "--base", trail.run, "--output", trail.run, "--name", "guest", *slow)
    process = subprocess.Popen([sys.executable, "-m", "coldctl", *map(str, command)], stderr=subprocess.DEVNULL)
    begun = trail.iteration(1) / "contributions" / ".guest.partial"
    deadline = time.monotonic() + 120
    while not ((begun / ".identity").exists() and (begun / ".identity").read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trail.go_on(1)
    spare = tmp_path / "spare"
    shutil.copytree(trail.run, spare)
    assert join(trail, mine, "--name", "guest").code == 0  # with other settings, so it is other work
    assert (trail.iteration(2) / "contributions" / "guest").exists()
    shutil.rmtree(trail.run)
    shutil.copytree(spare, trail.run)
    ran = trail.coldctl(*command)
    assert ran.code == 0, ran.stderr
    assert "going on with what was begun on the base of iteration 1" in ran.stderr
    assert manifest(trail.iteration(1) / "contributions" / "guest")["base"]["name"] == "base"
    assert not (trail.iteration(2) / "contributions").exists()
    shutil.rmtree(trail.run)
    shutil.copytree(spare, trail.run)
    ran = trail.coldctl(*command, "--overwrite")
    assert ran.code == 0, ran.stderr
    assert (trail.iteration(2) / "contributions" / "guest").exists()
    assert not begun.exists()
