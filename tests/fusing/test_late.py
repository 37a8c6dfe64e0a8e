"""Contributions that come late: how they enter a fuse, that they are found, and that they count once."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldctl.artifacts.model_ref import resolve
from coldctl.commands.fuse import fuse
from coldctl.common.errors import CheckpointError
from coldctl.config.settings import FuseConfig
from helpers import tiny
from helpers.bodies import body, poison
from helpers.offers import offer
from helpers.trail import Run, Trail, flip

METHODS: dict[str, tuple[object, ...]] = {
    "mean": (),
    "task-arithmetic": ("--scale", 0.7),
    "ties": (),
    "dare": (),
    "model-stock": (),
    "slerp": (),
    "median": (),
    "trimmed-mean": ("--trim", 0.34),
    "multi-krum": ("--byzantine", 0),
    "geometric-median": (),
    "fisher": (),
}


@pytest.fixture
def trail(tmp_path: Path, base: Path, coldctl: Run) -> Trail:
    return Trail(tmp_path, base, coldctl)


def wide(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: array.astype(np.float64) for name, array in body(path).items() if array.dtype.kind == "f"}


def test_the_arithmetic_is_the_documented_one(trail: Trail, tmp_path: Path, coldctl: Run) -> None:
    """Against whole models in float64: two iterations old, one iteration old, and of now."""
    old = offer(trail.bases[0], tmp_path / "given" / "old", seed=1)
    trail.give(1, "a", seed=2)
    trail.go_on(1)
    middle = offer(trail.bases[1], tmp_path / "given" / "middle", seed=3)
    trail.give(2, "b", seed=4)
    trail.go_on(2)
    new = offer(trail.bases[2], tmp_path / "given" / "new", seed=5)
    ran = coldctl("fuse", tmp_path / "given", "--base", trail.run, "--output", tmp_path / "out", "--stale", "discount",
                  "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    records = {item["name"]: item for item in ran.json["contributions"]}
    assert [records[name]["age"] for name in ("old", "middle", "new")] == [2, 1, 0]
    shares = [3**-0.5, 2**-0.5, 1.0]
    assert [records[name]["discount"] for name in ("old", "middle", "new")] == pytest.approx(shares, rel=1e-15)
    assert all(item["weight"] == pytest.approx(1 / 3) and item["verified"] for item in records.values())
    now, found = wide(trail.bases[2]), body(tmp_path / "out")
    bases, given = [wide(path) for path in trail.bases], [wide(path) for path in (old, middle, new)]
    squares = 0.0
    for name, start in now.items():
        moved = [start + s * (x[name] - then[name]) for s, x, then in zip(shares, given, bases, strict=True)]
        squares += float(((moved[0] - start) ** 2).sum())
        expected = (sum(moved) / 3).astype(np.float32)
        differing = np.count_nonzero(found[name] != expected)  # a tie in the last bit may fall either way
        assert differing <= max(1, expected.size // 10_000), name
        np.testing.assert_allclose(found[name], expected, rtol=1.2e-7, atol=1e-12)
    assert records["old"]["update_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    again = coldctl("fuse", new, old, middle, "--base", trail.bases[2], "--output", tmp_path / "again", "--stale",
                    "discount", "--old-base", trail.bases[0], "--old-base", trail.bases[1], "--json")  # fmt: skip
    assert again.json["body_digest"] == ran.json["body_digest"], again.stderr
    flip(trail.bases[1] / "model.safetensors")
    ran = coldctl("fuse", middle, "--base", trail.bases[2], "--output", tmp_path / "no", "--stale", "discount",
                  "--old-base", trail.bases[1])  # fmt: skip
    assert ran.code == 2
    assert "its base, is not what its manifest says: fetch it again" in ran.stderr


def test_what_is_refused_says_what_to_give(trail: Trail, tmp_path: Path, coldctl: Run) -> None:
    old = offer(trail.bases[0], tmp_path / "given" / "old", seed=1)
    trail.give(1, "a", seed=2)
    trail.go_on(1)
    shutil.copytree(trail.bases[1], tmp_path / "alone")
    offer(trail.bases[1], tmp_path / "given" / "new", seed=5)
    ran = coldctl("fuse", tmp_path / "given", "--base", trail.run, "--output", tmp_path / "out")  # as it always was
    assert ran.code == 2
    assert "was finetuned from another base" in ran.stderr
    assert "the base 1 iteration ago, --stale discount takes it" in ran.stderr
    given, alone = tmp_path / "given", tmp_path / "alone"
    flags = ("fuse", given, "--base", alone, "--output", tmp_path / "out", "--stale", "discount")
    ran = coldctl(*flags)
    assert ran.code == 2
    assert "is not at hand: give it as --old-base" in ran.stderr
    assert coldctl(*flags, "--old-base", trail.bases[1]).code == 2  # that is another one
    broken = poison(trail.bases[0], tmp_path / "broken", 7.0)
    assert coldctl(*flags, "--old-base", broken).code == 2
    stranger = offer(
        tiny.perturb(trail.bases[0], tmp_path / "elsewhere", seed=8), tmp_path / "given" / "stranger", seed=9
    )
    ran = coldctl(*flags, "--old-base", trail.bases[0])
    assert ran.code == 2
    assert "was finetuned from another base" in ran.stderr
    assert str(old) not in ran.stderr
    shutil.rmtree(stranger)
    assert coldctl(*flags, "--old-base", tmp_path / "nowhere", "--old-base", trail.bases[0]).code == 0
    flip(old / "model.safetensors")
    shutil.rmtree(tmp_path / "out")
    ran = coldctl(*flags, "--old-base", trail.bases[0])
    assert ran.code == 2
    assert "its manifest says" in ran.stderr


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_them(method: str, trail: Trail, coldctl: Run) -> None:
    """The same result whether an old one is moved by the fuse or had been moved before, in float64, by somebody else."""
    trail.give(1, "a", seed=1)
    late = offer(trail.bases[0], trail.run.parent / "late", seed=2)
    trail.go_on(1)
    names = ["one"] if method == "slerp" else ["one", "two", "three", "four"]
    for seed, name in enumerate(names):
        trail.give(2, name, seed=10 + seed)
    shutil.copytree(late, trail.iteration(1) / "contributions" / "late")
    if method == "fisher":
        for place in trail.run.glob("iteration-00*/contributions/*"):
            spread_fisher(place, trail.bases[0])
    ran = trail.fuse(2, "--method", method, *METHODS[method])
    assert ran.code == 0, ran.stderr
    records = {item["name"]: item for item in ran.json["contributions"]}
    assert records["late-iteration-001"]["age"] == 1
    assert len(records) == len(names) + 1
    assert all(np.isfinite(array).all() for array in wide(trail.iteration(2) / "fused").values())
    if method in ("dare", "fisher"):  # one draws by the body's digest, the other looks for a file beside the weights
        return
    moved = trail.run.parent / "moved" / "late"
    shutil.copytree(trail.bases[1], moved)
    (moved / "coldctl.json").unlink()
    move(late, trail.bases[0], trail.bases[1], moved)
    others = [trail.iteration(2) / "contributions" / name for name in names]
    by_hand = coldctl("fuse", *others, moved, "--base", trail.bases[1], "--output", trail.run.parent / "by-hand",
                      "--method", method, *METHODS[method])  # fmt: skip
    assert by_hand.code == 0, by_hand.stderr
    for name, array in body(trail.run.parent / "by-hand").items():
        np.testing.assert_allclose(body(trail.iteration(2) / "fused")[name], array, rtol=1e-6, atol=1e-9)


def move(late: Path, then: Path, now: Path, folder: Path) -> None:
    import torch

    x, before, start = wide(late), wide(then), wide(now)
    moved = [(name, torch.from_numpy(start[name] + 2**-0.5 * (x[name] - before[name]))) for name in start]
    (folder / "model.safetensors").unlink()
    tiny.write_tensors(folder / "model.safetensors", moved, {"format": "pt"})


def spread_fisher(folder: Path, base: Path) -> None:
    import torch

    from coldctl.artifacts import manifest

    tensors = [(name, torch.rand(array.shape)) for name, array in wide(base).items()]
    tiny.write_tensors(folder / "fisher.safetensors", tensors, {"format": "pt"})
    manifest.write(folder, manifest.read(folder))


def test_late_ones_are_found_and_count_once(trail: Trail) -> None:
    trail.give(1, "a", seed=1)
    trail.give(1, "b", seed=2)
    trail.go_on(1)
    trail.give(1, "late", seed=3)  # after iteration 1 was fused
    trail.give(2, "a", seed=4)
    (trail.iteration(1) / "contributions" / ".slow.partial").mkdir()
    second = trail.go_on(2)
    assert {name: item["age"] for name, item in second.items()} == {"a": 0, "late-iteration-001": 1}
    assert second["late-iteration-001"]["iteration"] == 1
    trail.give(3, "a", seed=5)
    trail.give(2, "slow", seed=6)
    trail.give(1, "later", seed=7, base=1)
    third = trail.go_on(3)
    assert {name: item["age"] for name, item in third.items()} == {
        "a": 0, "slow-iteration-002": 1, "later-iteration-001": 2,
    }  # fmt: skip
    trail.give(4, "a", seed=8)
    assert set(trail.go_on(4)) == {"a"}
    lineage = trail.coldctl("lineage", trail.run)
    assert "later-iteration-001 on later, 2 iterations old" in lineage.stderr
    status = trail.coldctl("status", trail.run, "--json").json["iterations"]
    assert status[2]["late"] == {"later-iteration-001": 2, "slow-iteration-002": 1}
    trail.give(3, "unseen", seed=9)
    assert trail.coldctl("status", trail.run, "--json").json["waiting"] == ["unseen-iteration-003"]
    assert "late, waiting for the next fuse: unseen-iteration-003" in trail.coldctl("status", trail.run).stderr


def test_only_late_ones_make_an_iteration(trail: Trail) -> None:
    trail.give(1, "a", seed=1)
    trail.go_on(1)
    assert trail.fuse(2).code == 2
    trail.give(1, "b", seed=2)
    assert set(trail.go_on(2)) == {"b-iteration-001"}


def test_duplicates_count_once(trail: Trail) -> None:
    given = trail.give(1, "a", seed=1)
    shutil.copytree(given, trail.iteration(1) / "contributions" / "copy")
    ran = trail.fuse(1)
    assert [item["name"] for item in ran.json["contributions"]] == ["a"]
    assert "is the same as a: it counts once" in ran.stderr
    trail.go_on(1)
    trail.give(2, "b", seed=2)
    shutil.copytree(given, trail.iteration(2) / "contributions" / "a")  # what iteration 1 has had
    aside = (trail.iteration(2) / "contributions" / "b").rename(trail.run.parent / "b")
    ran = trail.fuse(2)
    assert ran.code == 2
    assert "holds no contribution that has not been counted yet: wait for new ones" in ran.stderr
    aside.rename(trail.iteration(2) / "contributions" / "b")
    shutil.copytree(given, trail.iteration(1) / "contributions" / "copy-again")
    shutil.rmtree(given)
    trail.give(1, "a", seed=3)  # another one under the name that iteration 1 has counted
    ran = trail.fuse(2)
    assert [item["name"] for item in ran.json["contributions"]] == ["b"], ran.stderr
    assert "a was given to an earlier iteration, which counted it: it counts once" in ran.stderr


def test_rejecting_leaves_late_ones_and_stops_nobody(trail: Trail) -> None:
    trail.give(1, "a", seed=1)
    trail.go_on(1)
    trail.give(1, "late", seed=2)
    trail.give(2, "b", seed=3)
    ran = trail.fuse(2, "--stale", "reject")
    assert ran.code == 0, ran.stderr
    assert [item["name"] for item in ran.json["contributions"]] == ["b"]
    assert "late-iteration-001 came late and is not taken: --stale discount would" in ran.stderr


def test_a_bad_late_one_is_left_out_and_written_down(trail: Trail) -> None:
    trail.give(1, "a", seed=1)
    trail.go_on(1)
    trail.give(1, "good", seed=2)
    flip(trail.give(1, "changed", seed=3) / "model.safetensors")
    (trail.give(1, "garbled", seed=4) / "coldctl.json").write_text("{")
    infinite = trail.give(1, "infinite", seed=5)
    poisoned = trail.run.parent / "poisoned"
    poison(infinite, poisoned, np.inf)
    shutil.rmtree(infinite)
    offer(poisoned, infinite, seed=5)
    trail.give(2, "b", seed=6)
    assert trail.fuse(2, "--strict").code == 3
    second = trail.go_on(2)
    assert {name: item["status"] for name, item in second.items()} == {
        "b": "fused", "good-iteration-001": "fused", "changed-iteration-001": "rejected",
        "garbled-iteration-001": "rejected", "infinite-iteration-001": "rejected",
    }  # fmt: skip
    assert "its manifest says" in second["changed-iteration-001"]["reason"]
    assert second["b"]["weight"] == 0.5
    trail.give(3, "c", seed=7)
    assert set(trail.go_on(3, "--screen", "reject")) == {"c"}  # they have been looked at


def test_a_late_one_that_changes_while_it_is_fused_stops_the_fuse(trail: Trail) -> None:
    """By then it is part of what was written."""
    trail.give(1, "a", seed=1)
    trail.go_on(1)
    weights = trail.give(1, "late", seed=2) / "model.safetensors"
    trail.give(2, "b", seed=3)

    class Listener:
        def begin(self, task: str, total: int | None, unit: str) -> None:
            if task == "fuse":
                flip(weights)

        def advance(self, task: str, steps: int, detail: str = "") -> None: ...
        def end(self, task: str) -> None: ...
        def note(self, message: str) -> None: ...

    output = trail.iteration(2) / "fused"
    with pytest.raises(CheckpointError, match="1 of 2 contributions cannot be fused") as caught:
        fuse(
            [str(trail.iteration(2) / "contributions")], resolve(str(trail.run)), output, FuseConfig(), overwrite=False,
            progress=Listener(),
        )  # fmt: skip
    assert "model.safetensors was changed after it was written" in caught.value.details[0]
    assert not output.exists()


def test_age_is_no_outlier(trail: Trail) -> None:
    """Updates that only their age has shortened do not stand out; one that is too long does, however old."""
    trail.give(1, "a", seed=1)
    trail.go_on(1)
    for number in (2, 3, 4):
        trail.give(number, "a", seed=number)
        trail.go_on(number)
    for seed in range(6):
        trail.give(5, f"now-{seed}", seed=10 + seed)
    trail.give(1, "old", seed=20)
    loud = trail.iteration(1) / "contributions" / "loud"
    offer(trail.bases[0], loud, seed=21, scale=0.2)
    fifth = trail.go_on(5, "--screen", "reject")
    assert [name for name, item in fifth.items() if item["status"] == "rejected"] == ["loud-iteration-001"]
    assert fifth["old-iteration-001"]["age"] == 4


def test_what_comes_after_the_fuse_undoes_nothing(trail: Trail) -> None:
    trail.give(1, "a", seed=1)
    first = trail.fuse(1)
    trail.give(1, "late", seed=2)
    again = trail.fuse(1)
    assert again.code == 0, again.stderr
    assert "late came after this iteration was fused: left to a later one" in again.stderr
    assert "left alone" in again.stderr
    assert again.json == first.json
    assert trail.fuse(1, "--method", "median").code == 2  # another config is another result, as everywhere
    assert [item["name"] for item in trail.fuse(1, "--overwrite").json["contributions"]] != ["a"]


def test_weighing_and_withdrawing_late_contributions(trail: Trail, tmp_path: Path, coldctl: Run) -> None:
    trail.give(1, "a", seed=1)
    trail.go_on(1)
    trail.give(1, "guest", seed=2)
    trail.give(2, "b", seed=3)
    trail.give(2, "c", seed=4)
    (tmp_path / "weights.toml").write_text("b = 1\nc = 1\nguest = 2\n")
    weighed = trail.fuse(2, "--weights", tmp_path / "weights.toml").json["contributions"]
    assert {item["name"]: item["weight"] for item in weighed} == {"b": 0.25, "c": 0.25, "guest-iteration-001": 0.5}
    fused = trail.iteration(2) / "fused"
    assert trail.fuse(2, "--overwrite").code == 0
    for name in ("guest-iteration-001", "c"):
        ran = coldctl("fuse", fused, "--without", name, "--base", trail.run, "--output", tmp_path / name, "--json")
        assert ran.code == 0, ran.stderr
        assert name not in {item["name"] for item in ran.json["contributions"]}


@pytest.mark.parametrize("encoding", [("--lora-rank", 2), ("--send", "delta-int8")])
def test_what_differs_from_its_base_is_decoded_on_that(
    encoding: tuple[object, ...], trail: Trail, tmp_path: Path, coldctl: Run
) -> None:
    pytest.importorskip("peft")
    data = tiny.make_dataset(tmp_path / "mine", seed=7)
    fast = ("--epochs", 1, "--batch-size", 16, "--learning-rate", 1e-2, *encoding)
    late = tmp_path / "late"
    assert coldctl("finetune", data, "--base", trail.bases[0], "--output", late, *fast).code == 0
    trail.give(1, "a", seed=1)
    trail.go_on(1)
    shutil.copytree(late, trail.iteration(1) / "contributions" / "late")
    whole = coldctl("fuse", late, "--base", trail.bases[0], "--output", tmp_path / "whole", "--dtype", "float64")
    assert whole.code == 0, whole.stderr
    second = trail.go_on(2)
    assert second["late-iteration-001"]["verified"]
    then, now, x = wide(trail.bases[0]), wide(trail.bases[1]), wide(tmp_path / "whole")
    for name, array in wide(trail.iteration(2) / "fused").items():
        np.testing.assert_allclose(array, now[name] + 2**-0.5 * (x[name] - then[name]), rtol=1e-6, atol=1e-9)
    assert json.loads((trail.iteration(2) / "fused" / "coldctl.json").read_text())["config"]["stale"] == "discount"
