"""A thousand contributors who come as they like: late, never, twice, with broken files, to a fuser that is killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from conftest import Ran, suite_text
from helpers.offers import offer

Run = Callable[..., Ran]
CONTRIBUTORS, ITERATIONS = 1000, 8
WEIGHTS = "model.safetensors"


@dataclass
class Crowd:
    """What a thousand contributors did, and when what they made was there to be fused."""

    place: Path
    base: Path
    drawn: random.Random = field(default_factory=lambda: random.Random(12))
    waiting: dict[int, list[tuple[Path, Path]]] = field(default_factory=dict)  # what arrives before which iteration
    delivered: dict[str, tuple[int, Path]] = field(default_factory=dict)  # sound ones: their iteration, and the body
    broken: set[str] = field(default_factory=set)
    copies: set[str] = field(default_factory=set)

    def contributions(self, number: int) -> Path:
        return self.place / "run" / f"iteration-{number:03d}" / "contributions"

    def start(self, number: int, base: Path) -> None:
        """This iteration's share of the contributors downloads the base, and something becomes of each."""
        share = CONTRIBUTORS // ITERATIONS
        for index in range(share):
            name = f"team-{number}-{index:03d}"
            made = offer(base, self.place / "made" / name, seed=number * share + index, scale=0.02)
            target = self.contributions(number) / name
            fate = self.drawn.choices(
                ["in time", "straggles", "drops out", "comes twice", "is broken"], [78, 8, 5, 5, 4]
            )[0]
            arrives = number + (self.drawn.randint(1, 3) if fate == "straggles" else 0)
            if fate == "drops out":  # and leaves what a killed training leaves
                shutil.copytree(made, target.parent / f".{name}.partial")
                (target.parent / f".{name}.partial" / "coldctl.json").unlink()
                continue
            if fate == "is broken":
                data = bytearray((made / WEIGHTS).read_bytes())
                data[-5] ^= 0x40
                (made / WEIGHTS).write_bytes(data)
                self.broken.add(name)
            elif arrives <= ITERATIONS:
                self.delivered[name] = number, made
            self.waiting.setdefault(arrives, []).append((made, target))
            if fate == "comes twice":
                self.waiting.setdefault(arrives, []).append((made, target.with_name(f"{name}-again")))
                self.copies.add(name)

    def deliver(self, number: int) -> None:
        """What arrives before iteration `number` is fused; a directory appears at once, as our outputs do."""
        for made, target in self.waiting.pop(number, []):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made, target.with_name(f".{target.name}.coming"))
            target.with_name(f".{target.name}.coming").rename(target)


def watch(place: Path, coldctl: Run, *, killed_after: float | None = None) -> None:
    """One look; first, in a process of its own, one that is killed after so many seconds."""
    command = ("watch", place / "run", "--min-contributions", 50, "--once", "--config", place / "suite.toml")
    if killed_after is not None:
        process = subprocess.Popen([sys.executable, "-m", "coldctl", *map(str, command)], stderr=subprocess.DEVNULL)
        time.sleep(killed_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
    ran = coldctl(*command)
    assert ran.code == 0, ran.stderr


def test_a_thousand_contributors(base: Path, tmp_path: Path, coldctl: Run) -> None:
    """Every sound contribution counts once, with its age; no broken one counts; a killed fuser changes nothing."""
    shutil.copytree(base, tmp_path / "base")
    text = suite_text("base").split("[[dataset]]")[0]
    (tmp_path / "suite.toml").write_text(text + '[fuse]\nscreen = "reject"\n')
    assert coldctl("plan", tmp_path / "run", "--config", tmp_path / "suite.toml", "--iterations", 0).code == 0
    crowd = Crowd(tmp_path, base)
    bases = [tmp_path / "base"]
    for number in range(1, ITERATIONS + 1):
        crowd.start(number, bases[-1])
        crowd.deliver(number)
        watch(tmp_path, coldctl, killed_after=crowd.drawn.uniform(1.0, 4.0) if number % 4 == 1 else None)
        bases.append(tmp_path / "run" / f"iteration-{number:03d}" / "fused")
    manifests = [json.loads((place / "coldctl.json").read_text()) for place in bases[1:]]
    check_books(crowd, manifests)
    for number, document in enumerate(manifests, start=1):
        check_arithmetic(crowd, bases, number, document)


def check_books(crowd: Crowd, manifests: list[dict[str, Any]]) -> None:
    fused: Counter[str] = Counter()
    ages: dict[str, int] = {}
    for number, document in enumerate(manifests, start=1):
        for record in document["contributions"]:
            name = record["name"].removesuffix("-again").partition("-iteration-")[0]
            if record["status"] == "fused":
                fused[name] += 1
                ages[name] = record["age"]
                assert record["age"] == number - crowd.delivered[name][0]
    outliers = {
        record["name"]
        for document in manifests
        for record in document["contributions"]
        if record["status"] == "rejected" and "outlier" in (record["reason"] or "")
    }
    assert set(fused) | outliers == set(crowd.delivered)
    assert set(fused.values()) == {1}
    assert len(outliers) <= 0.01 * CONTRIBUTORS
    assert not crowd.broken & set(fused)
    assert sum(age > 0 for age in ages.values()) > 0.04 * CONTRIBUTORS
    assert crowd.copies


def check_arithmetic(crowd: Crowd, bases: list[Path], number: int, document: dict[str, Any]) -> None:
    """The fused weights of an iteration, against sums of our own over what its manifest says was fused."""
    before = load_file(bases[number - 1] / WEIGHTS)
    after = load_file(bases[number] / WEIGHTS)
    total = {name: np.zeros(value.shape) for name, value in before.items()}
    records = [record for record in document["contributions"] if record["status"] == "fused"]
    for record in records:
        name = record["name"].removesuffix("-again").partition("-iteration-")[0]
        started, made = crowd.delivered[name]
        own, then = load_file(made / WEIGHTS), load_file(bases[started - 1] / WEIGHTS)
        share = (1 + number - started) ** -0.5
        for key, value in before.items():
            total[key] += value + share * (own[key].astype(np.float64) - then[key]) if number > started else own[key]
    for key, value in after.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, total[key] / len(records), rtol=0, atol=2e-7)
