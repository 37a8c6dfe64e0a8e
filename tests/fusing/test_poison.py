"""Poisoned contributions: what `--screen reject` drops, what it must leave alone, and how often it errs on clean ones."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from coldctl.fusing.blocks import Block
from coldctl.fusing.statistics import UpdateStatistics, outliers
from conftest import Ran
from helpers.bodies import body, digest

Run = Callable[..., Ran]
Body = dict[str, NDArray[np.float32]]
Attack = Callable[[Sequence[Body], Sequence[Body]], list[Body]]
COUNT = 8


def load(folder: Path) -> Body:
    return load_file(folder / "model.safetensors")


def write(base: Path, folder: Path, update: Body) -> Path:
    """A plain checkpoint that lies `update` away from the base."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    start = load(base)
    moved = {name: start[name] + update[name] if name in update else start[name] for name in start}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


def norm(update: Body) -> float:
    return float(np.sqrt(sum(float(np.vdot(part, part)) for part in update.values())))


def times(factor: float, update: Body) -> Body:
    return {name: np.float32(factor) * part for name, part in update.items()}


def mean(updates: Sequence[Body]) -> Body:
    return {name: np.mean([update[name] for update in updates], axis=0, dtype=np.float32) for name in updates[0]}


def drawn(start: Body, seed: int, length: float) -> Body:
    rng = np.random.default_rng(seed)
    floating = {name: part for name, part in start.items() if part.dtype == np.float32}
    update = {name: rng.standard_normal(part.shape, np.float32) for name, part in floating.items()}
    return times(length / norm(update), update)


@pytest.fixture(scope="module")
def tasks(base: Path) -> dict[str, list[Body]]:
    """Eight honest updates of unlike norms: of unlike tasks, which are orthogonal, and of tasks that agree."""
    start = load(base)
    lengths = np.random.default_rng(5).lognormal(0.0, 0.2, COUNT)
    unlike = [drawn(start, seed, float(length)) for seed, length in enumerate(lengths)]
    common = drawn(start, 99, 0.8)
    alike = [{name: common[name] + update[name] for name in update} for update in unlike]
    return {"unlike": unlike, "alike": alike}


def against_the_mean(factor: float | None) -> Attack:
    """All send the mean of the honest updates, turned round: `factor` of it, or as long as an honest update."""

    def made(own: Sequence[Body], others: Sequence[Body]) -> list[Body]:
        honest = mean(others)
        length = factor or float(np.median([norm(item) for item in others])) / norm(honest)
        return [times(-length, honest)] * len(own)

    return made


def not_a_number(own: Sequence[Body], others: Sequence[Body]) -> list[Body]:
    poisoned = [{name: part.copy() for name, part in update.items()} for update in own]
    for update in poisoned:
        next(iter(update.values())).reshape(-1)[0] = np.nan
    return poisoned


def noise(own: Sequence[Body], others: Sequence[Body]) -> list[Body]:
    return [drawn(update, 1000 + index, 100 * norm(update)) for index, update in enumerate(own)]


ATTACKS: dict[str, Attack] = {
    "not-a-number": not_a_number,
    "100-fold": lambda own, others: [times(100, update) for update in own],
    "random, 100-fold": noise,
    "huge": lambda own, others: [times(1e30, update) for update in own],
    "inner product, 0.5": against_the_mean(0.5),
    "inner product, long": against_the_mean(None),
}


def offered(base: Path, folder: Path, attack: Attack, updates: Sequence[Body], count: int) -> list[Path]:
    made = [*attack(updates[:count], updates[count:]), *updates[count:]]
    return [write(base, folder / f"part-{index}", update) for index, update in enumerate(made)]


@pytest.mark.parametrize("kind", ["unlike", "alike"])
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_attackers_are_dropped_and_nobody_else(
    count: int, name: str, kind: str, tasks: dict[str, list[Body]], base: Path, tmp_path: Path, coldctl: Run
) -> None:
    updates = tasks[kind]
    parts = offered(base, tmp_path, ATTACKS[name], updates, count)
    ran = coldctl("fuse", *parts, "--base", base, "--output", tmp_path / "fused", "--screen", "reject", "--json")
    assert ran.code == 0, ran.stderr
    rejected = {item["name"]: item["reason"] for item in ran.json["contributions"] if item["status"] == "rejected"}
    assert set(rejected) == {f"part-{index}" for index in range(count)}
    assert all(rejected.values())
    coldctl("fuse", *parts[count:], "--base", base, "--output", tmp_path / "honest")
    assert digest(tmp_path / "fused") == digest(tmp_path / "honest")
    start, found = load(base), body(tmp_path / "fused")
    step = {key: found[key] - start[key] for key in updates[0]}
    whole = mean(updates)
    towards = sum(float(np.vdot(step[key], whole[key])) for key in whole) / norm(whole) ** 2
    assert 0.5 < towards < 1.5  # most of what the mean of all eight would have been


@pytest.mark.parametrize("count", [1, 2, 3])
def test_turned_round_among_tasks_that_agree(
    count: int, tasks: dict[str, list[Body]], base: Path, tmp_path: Path, coldctl: Run
) -> None:
    parts = offered(base, tmp_path, lambda own, others: [times(-1, update) for update in own], tasks["alike"], count)
    ran = coldctl("fuse", *parts, "--base", base, "--output", tmp_path / "fused", "--screen", "reject", "--json")
    assert {item["name"] for item in ran.json["contributions"] if item["status"] == "rejected"} == {
        f"part-{index}" for index in range(count)
    }
    assert "points against the others" in ran.stdout


@pytest.mark.parametrize("kind", ["unlike", "alike", "mixed"])
def test_clean_contributions_are_left_alone(
    kind: str, tasks: dict[str, list[Body]], base: Path, tmp_path: Path, coldctl: Run
) -> None:
    """Also where five tasks agree and three are others: to share nothing is not to point against."""
    updates = [*tasks["alike"][:5], *tasks["unlike"][5:]] if kind == "mixed" else tasks[kind]
    parts = offered(base, tmp_path, lambda own, others: [], updates, 0)
    ran = coldctl("fuse", *parts, "--base", base, "--output", tmp_path / "fused", "--screen", "reject", "--strict")
    assert ran.code == 0, ran.stderr


def test_what_was_not_trained_apart_counts_once(
    tasks: dict[str, list[Body]], base: Path, tmp_path: Path, coldctl: Run
) -> None:
    updates = [*tasks["unlike"][:6], tasks["unlike"][0], times(1.01, tasks["unlike"][0])]
    parts = offered(base, tmp_path, lambda own, others: [], updates, 0)
    ran = coldctl("fuse", *parts, "--base", base, "--output", tmp_path / "fused", "--screen", "reject", "--json")
    rejected = {item["name"]: item["reason"] for item in ran.json["contributions"] if item["status"] == "rejected"}
    assert set(rejected) == {"part-6", "part-7"}
    assert all("is nearly that of part-0" in reason for reason in rejected.values())
    same = [write(base, tmp_path / f"same-{index}", updates[0]) for index in range(5)]
    ran = coldctl("fuse", *same, "--base", base, "--output", tmp_path / "same", "--screen", "reject", "--strict")
    assert ran.code == 0, ran.stderr  # where all are alike it is no sign of anything


@pytest.mark.parametrize("count", [5, 8, 20])
def test_clean_contributions_are_seldom_dropped(count: int) -> None:
    """One fuse in a hundred, where the norms are spread as a lognormal distribution spreads them."""
    rng = np.random.default_rng(count)
    samples, dropped = 600, 0
    base = np.zeros(400, np.float32)
    for _ in range(samples):
        lengths = rng.lognormal(0.0, 0.5, (count, 1))
        directions = rng.standard_normal((count, base.size))
        rows = (lengths * directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
        statistics = UpdateStatistics(count, pairs=True)
        statistics.add(Block("layer.0.weight", 0, base.size, base, list(rows), []), rows.mean(0, dtype=np.float64))
        dropped += bool(outliers(statistics, [str(index) for index in range(count)]))
    assert dropped / samples < 0.025
