"""A full round on tiny models, killed at 200 seeded moments: nothing complete is lost, repeated or changed.

    make test-faults                  # all of it
    KILLS=20 pytest -s tests/faults/test_killed.py

Every kill is followed by the same command, which may be killed in turn; at the end all that the round made is compared
with what a round made that nobody disturbed.
"""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mortal
import pytest
from mortal import KINDS, Kind, Moment, Script

from coldctl.artifacts import layout, manifest
from conftest import suite_text
from helpers import tiny

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "200"))
EACH = 2  # kills that are tried in each command of a round
WHOLE_KILLS = 6
SCRIPT = (
    f"sh {ROOT}/scripts/iterate.sh && coldctl publish $RUN --config $CONFIG --to $RUN/../published "
    "--evaluation $RUN/iteration-002/evaluation"
)
EVERY_STEP = {"finetune": ("--checkpoint-seconds", "0")}
SETTINGS = """
[fuse]
outer_optimizer = "nesterov"
outer_lr = 0.7
outer_momentum = 0.9
[evaluate]
protocol = ["linear-probe", "finetune"]
seeds = 1
"""


@dataclass(frozen=True)
class Undisturbed:
    """A round that nobody killed: what it made, and what each of its commands took."""

    place: Path
    commands: dict[str, mortal.Ended]  # by label


def label_of(arguments: Sequence[str]) -> str:
    """A command of the round by its stage and what it makes."""
    output = Path(arguments[arguments.index("--output") + 1]) if "--output" in arguments else Path(arguments[1])
    piece = output.name if output.name in ("evaluation", "gate") else ""
    number = next((part.removeprefix("iteration-") for part in output.parts if part.startswith("iteration-")), "")
    if arguments[0] in ("finetune", "promote"):
        number = f"{len(json.loads((output / layout.RUN).read_text())['iterations']) + 1:03d}"
    return " ".join(part for part in (arguments[0], piece, number) if part)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three datasets and their suite. Made in a process of its own: no thread may start in this one."""
    place = tmp_path_factory.mktemp("start")
    mortal.warm()
    if (child := os.fork()) == 0:
        for seed, name in enumerate(("red", "green", "blue")):
            tiny.make_dataset(place / name, seed=seed, train=96)
        tiny.make_base("bert", place / "base")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    text = suite_text("base").replace("epochs = 1", "epochs = 4").replace("[publish]", f"{SETTINGS}[publish]")
    (place / "suite.toml").write_text(text)
    return place


def environment_of(place: Path) -> dict[str, str]:
    return {
        "RUN": str(place / "run"), "CONFIG": str(place / "suite.toml"), "ITERATIONS": "2", "TARGET": "2", "JOBS": "1",
        "SAMPLE": "", "GATE": "1", "COLDCTL_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def play(place: Path, choose: mortal.Choose) -> Script:
    return mortal.run(SCRIPT, place / "tools", environment_of(place), choose, EVERY_STEP)


@pytest.fixture(scope="module")
def undisturbed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    place = tmp_path_factory.mktemp("undisturbed") / "place"
    shutil.copytree(start, place)
    labels: list[str] = []
    script = play(place, lambda arguments: labels.append(label_of(arguments)))
    assert script.code == 0, script.output
    return Undisturbed(place, dict(zip(labels, script.commands, strict=True)))


def standing(place: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file that is part of something complete."""
    found = {}
    for path in sorted((*place.glob("run/**/*"), *place.glob("published/**/*"))):
        parts = path.relative_to(place).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        if path.parent.name == layout.CELLS or any(layout.is_complete(parent) for parent in path.parents):
            found["/".join(parts)] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def half_written(place: Path) -> list[str]:
    """What can be seen and is not whole."""
    wrong = []
    for folder in [path.parent for path in place.rglob(layout.MANIFEST)]:
        if any(part.startswith(".") for part in folder.relative_to(place).parts):
            continue
        document = manifest.read(folder)
        wrong += [f"{folder}: {name}" for name in manifest.changed_files(folder, document)]
    visible = [*place.glob("run/iteration-*/contributions/*"), *place.glob("run/iteration-*/*"), place / "published"]
    for folder in visible:
        if folder.is_dir() and not folder.name.startswith(".") and folder.name != "contributions":
            wrong += [] if layout.is_complete(folder) else [f"{folder} has no manifest"]
    for path in (*place.glob("run/cells/*.json"), *place.glob("run/run.json")):
        json.loads(path.read_text())
    return wrong


def content(place: Path) -> dict[str, Any]:
    """All that a round made, but for times and places: what two of them must have in common."""
    found: dict[str, Any] = {}
    for path in sorted((*place.glob("run/**/*"), *place.glob("published/**/*"))):
        name = path.relative_to(place).as_posix()
        if not path.is_file():
            continue
        if path.name == layout.MANIFEST:
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix not in (".html", ".md"):  # they say when
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = None
    return found


def timeless(document: Any) -> Any:
    """A manifest without what says when, and without what follows from that."""
    if isinstance(document, dict):
        gone = ("created", "environment", "manifest_digest", layout.CARD, layout.REPORT, layout.PAGE)
        return {key: timeless(value) for key, value in document.items() if key not in gone}
    return [timeless(item) for item in document] if isinstance(document, list) else document


def plan_of(seed: int, undisturbed: Undisturbed) -> dict[str, list[Moment]]:
    """Seeded moments for every command of a round."""
    rng = random.Random(seed)
    largest = max(path.stat().st_size for path in (undisturbed.place / "run").rglob("*") if path.is_file())
    plan = {}
    for label, command in undisturbed.commands.items():
        if label == "status":
            continue
        drawn = []
        for _ in range(EACH):
            kind: Kind = rng.choice(KINDS)
            at = {
                "call": rng.randint(1, max(1, command.changes)),
                "bytes": int(math.exp(rng.uniform(math.log(16), math.log(largest)))),
                "time": rng.uniform(0, command.seconds),
            }[kind]
            drawn.append(Moment(kind, at))
        plan[label] = drawn
    return plan


killed: Counter[tuple[str, Kind]] = Counter()
outlived: Counter[tuple[str, Kind]] = Counter()


def one_round(seed: int, start: Path, place: Path, undisturbed: Undisturbed) -> int:
    """A round from its beginning to its end, killed again and again. Returns how often."""
    shutil.copytree(start, place)
    plan = plan_of(seed, undisturbed)
    complete: dict[str, tuple[int, int]] = {}
    kills = 0
    while True:
        chosen: list[tuple[str, Moment]] = []

        def choose(arguments: Sequence[str]) -> Moment | None:
            label = label_of(arguments)
            if not plan.get(label):
                return None
            moment = plan[label].pop()
            chosen.append((label, moment))  # noqa: B023  called within this turn only
            return moment

        script = play(place, choose)
        now = standing(place)
        assert {name: now.get(name) for name in complete} == complete, f"seed {seed}, after {chosen}"
        complete = now
        assert half_written(place) == [], f"seed {seed}, after {chosen}"
        for label, moment in chosen if not script.killed else chosen[:-1]:
            outlived[label.split()[0], moment.kind] += 1
        if not script.killed:
            assert script.code == 0, f"seed {seed}: {script.output}"
            return kills
        label, moment = chosen[-1]
        killed[label.split()[0], moment.kind] += 1
        kills += 1


def test_a_round_killed_at_200_moments_ends_as_one_that_was_not(
    start: Path, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = content(undisturbed.place)
    began, kills, seed, left = time.monotonic(), 0, 0, Counter[str]()
    while kills < KILLS:
        place = tmp_path / str(seed)
        kills += one_round(seed, start, place, undisturbed)
        found = content(place)
        hidden = {name for name in found if any(part.startswith(".") for part in name.split("/"))}
        left.update("/".join(Path(name).parent.parts[-2:]) for name in hidden)
        visible = {name: value for name, value in found.items() if name not in hidden}
        different = sorted(name for name in {*expected, *visible} if expected.get(name, 0) != visible.get(name, 0))
        assert different == [], f"seed {seed}: {different}"
        shutil.rmtree(place)
        seed += 1
    with capsys.disabled():
        print(f"\n{kills} kills in {seed} rounds, {time.monotonic() - began:.0f} s; all ended with the same bits")
        print(f"{'stage':<10}" + "".join(f"{kind:>8}" for kind in KINDS) + f"{'outlived':>12}")
        for stage in dict.fromkeys(stage for stage, _ in (*killed, *outlived)):
            ran = sum(outlived[stage, kind] for kind in KINDS)
            print(f"{stage:<10}" + "".join(f"{killed[stage, kind]:>8}" for kind in KINDS) + f"{ran:>12}")
        print(f"hidden files that stayed behind: {dict(left)}")


def test_whole_processes_with_two_jobs(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same without the shortcut of forking: the script as it is called, its workers side by side, all killed at once."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def begin(place: Path) -> "subprocess.Popen[bytes]":
        settings = {**environment_of(place), "JOBS": "2", "TARGET": "1", "GATE": "", "PATH": path}
        return subprocess.Popen(
            ["sh", f"{ROOT}/scripts/iterate.sh"], env={**os.environ, **settings}, process_group=0,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    whole, place = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, place):
        shutil.copytree(start, folder)
    began = time.monotonic()
    assert begin(whole).wait() == 0
    took = time.monotonic() - began
    rng, kills, complete = random.Random(3), 0, dict[str, tuple[int, int]]()
    while True:
        process = begin(place)
        try:
            code = process.wait(rng.uniform(0.05, 0.6) * took if kills < WHOLE_KILLS else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(1)  # workers see it within that time
            kills += 1
        else:
            assert code == 0
            break
        now = standing(place)
        assert {name: now.get(name) for name in complete} == complete
        complete = now
        assert half_written(place) == []
    found = {name: value for name, value in content(place).items() if "/." not in f"/{name}"}
    assert found == content(whole)
    with capsys.disabled():
        print(f"\n{kills} kills of whole processes, two jobs side by side")
