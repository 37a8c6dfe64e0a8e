"""One flipped bit in any file of ours is found before it is used, named by file, and mended by doing that stage again.

`make test` flips a few bits, `make test-faults` (FAULTS=all) 500.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from coldctl.artifacts import layout, manifest
from conftest import FAST, Ran, run_coldctl

Run = Callable[..., Ran]
FLIPS = 500 if os.environ.get("FAULTS") == "all" else 25


@dataclass(frozen=True)
class Made:
    """One thing of each kind, and the commands that made them."""

    base: Path
    data: Path
    suite: Path
    contributions: Path  # a folder of three
    fused: Path
    published: Path

    def makers(self) -> dict[Path, tuple[object, ...]]:
        one = self.contributions / "one"
        return {
            one: ("finetune", self.data, "--base", self.base, "--output", one, *FAST, "--jobs", 1),
            self.fused: ("fuse", self.contributions, "--base", self.base, "--output", self.fused,
                         "--outer-optimizer", "sgd"),
            self.published: ("publish", self.fused, "--to", self.published, "--license", "mit"),
        }  # fmt: skip

    def users(self, kind: str, folder: Path, output: Path) -> list[tuple[object, ...]]:
        """What reads a thing of a kind, itself or as one of several."""
        evaluate = ("evaluate", folder, "--suite", self.suite, "--baseline", self.base, "--output", output, "--jobs", 1)
        publish = ("publish", folder, "--to", output, "--license", "mit")
        if kind == "contribution":
            others = [self.contributions / "two", self.contributions / "three"]
            return [("fuse", folder, *others, "--base", self.base, "--output", output), evaluate, publish]
        finetune = ("finetune", self.data, "--base", folder, "--output", output, *FAST, "--jobs", 1)
        fuse = ("fuse", self.contributions, "--base", folder, "--output", output, "--allow-other-base")
        baseline = ("evaluate", self.base, "--suite", self.suite, "--baseline", folder, "--output", output, "--jobs", 1)
        return [finetune, fuse, evaluate, baseline, publish]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, base: Path, suite: Path, contributions: Path, workshop: Path
) -> Made:
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(contributions, place / "contributions")
    found = Made(base, workshop / "data-one", suite, place / "contributions", place / "fused", place / "published")
    for folder, command in found.makers().items():
        if not folder.exists():
            assert run_coldctl(*command).code == 0
    return found


def flipped(path: Path, bit: int) -> bytes:
    """Flip one bit of a file; returns what it held before."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(changed)
    return before


def means_the_same(path: Path, before: bytes) -> bool:
    """Whether a flip in a manifest changed how a number is written (1e-05, 1E-05), but nothing that it says."""
    if path.name != layout.MANIFEST:
        return False
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(before))
    except ValueError:
        return False


def test_every_flipped_bit_is_found_before_use(made: Made, tmp_path: Path) -> None:
    rng = random.Random(8)
    folders = {
        "contribution": made.contributions / "one",
        "fused": made.fused,
        "published": made.published,
    }
    copies = {kind: Path(shutil.copytree(folder, tmp_path / kind)) for kind, folder in folders.items()}
    files = [
        (kind, path) for kind, folder in copies.items()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size
    ]  # fmt: skip
    used: Counter[str] = Counter()
    for number in range(FLIPS):
        kind, path = files[number % len(files)] if number < len(files) else rng.choice(files)
        bit = rng.randrange(8 * path.stat().st_size)
        before = flipped(path, bit)
        name = path.relative_to(copies[kind]).as_posix()
        commands = made.users(kind, copies[kind], tmp_path / "out")
        command = commands[number % len(commands)]
        if not means_the_same(path, before):
            where = f"bit {bit} of {name} of the {kind}: "
            deep = run_coldctl("check", copies[kind], "--deep", "--quiet", "--json")
            assert deep.code == 3, where + deep.stdout
            assert name in deep.stdout, where + deep.stdout
            if name != layout.CARD:  # people write into it
                ran = run_coldctl(*command)
                assert ran.code == 2, where + f"{command}: {ran.stderr}"
                assert name in ran.stderr, where + ran.stderr
                assert not (tmp_path / "out").exists(), where
                used[f"{kind}: {command[0]}"] += 1
        path.write_bytes(before)
    assert sum(used.values()) > 0.8 * FLIPS
    for kind, folder in copies.items():
        assert run_coldctl("check", folder, "--deep").code == 0, kind


@pytest.mark.parametrize("file", [layout.MANIFEST, layout.WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("kind", ["contribution", "fused", "published"])
def test_doing_the_stage_again_mends_it(kind: str, file: str, made: Made) -> None:
    """Without --overwrite what is there is left alone or refused; with it, what is damaged is made again."""
    folder = {"contribution": made.contributions / "one", "fused": made.fused, "published": made.published}[kind]
    command = made.makers()[folder]
    digest = manifest.read(folder)["body_digest"]
    before = flipped(folder / file, 8 * 200 + 1)
    again = run_coldctl(*command)
    if file == layout.MANIFEST:
        assert again.code == 2
        assert "--overwrite makes it again" in again.stderr
    assert (folder / file).read_bytes() != before
    mended = run_coldctl(*command, "--overwrite")
    assert mended.code == 0, mended.stderr
    assert manifest.read_unchanged(folder)["body_digest"] == digest
    stamp = (folder / file).stat().st_mtime_ns
    assert "left alone" in run_coldctl(*command, "--overwrite").stderr  # nothing is damaged now
    assert (folder / file).stat().st_mtime_ns == stamp


def test_cells_and_training_states_are_believed_only_if_whole(
    tmp_path: Path, base: Path, suite: Path, contributions: Path, coldctl: Run
) -> None:
    """A damaged measurement is made again, a damaged checkpoint of a training is not gone on from."""
    command = ("evaluate", contributions / "one", "--suite", suite, "--baseline", base, "--jobs", 1, "--output")
    assert coldctl(*command, tmp_path / "out").code == 0
    results = json.loads((tmp_path / "out" / layout.RESULTS).read_text())
    cells = sorted((tmp_path / "out" / layout.CELLS).glob("*.json"))
    for path in cells[:2]:
        digit = next(at for at, byte in enumerate(path.read_bytes()) if byte == ord("0"))
        flipped(path, 8 * digit)
    ran = coldctl(*command, tmp_path / "out")
    assert ran.code == 2
    assert cells[0].name in ran.stderr
    assert coldctl(*command, tmp_path / "out", "--overwrite").code == 0
    assert json.loads((tmp_path / "out" / layout.RESULTS).read_text())["results"] == results["results"]


def test_a_damaged_checkpoint_of_a_training(tmp_path: Path) -> None:
    import torch

    from coldctl.common.errors import CheckpointError
    from coldctl.training import snapshot

    path = tmp_path / "state.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(()), "c": torch.ones(3, dtype=torch.bfloat16)}
    snapshot.write(path, tensors, {"step": 3})
    found, state = snapshot.read(path)
    assert state == {"step": 3}
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    rng = random.Random(0)
    for _ in range(60):
        before = flipped(path, rng.randrange(8 * path.stat().st_size))
        with pytest.raises(CheckpointError, match=r"state\.safetensors"):
            snapshot.read(path)
        path.write_bytes(before)
    path.write_bytes(before[:-1])
    with pytest.raises(CheckpointError):
        snapshot.read(path)
