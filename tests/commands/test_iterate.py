"""`scripts/iterate.sh` and the run it keeps: rounds, resumption, sampling, the gate."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from coldctl.artifacts import manifest
from coldctl.artifacts import run as runs
from coldctl.artifacts.model_ref import Model, resolve
from coldctl.common.errors import OutputError
from coldctl.common.progress import Progress
from coldctl.config.loading import read
from coldctl.config.settings import DatasetConfig, FinetuneConfig
from coldctl.data.datasets import config_from_reference
from coldctl.training.jobs import JobOptions, jobs_of_suite, single_job
from coldctl.workers.processes import in_processes
from conftest import Ran, suite_text
from helpers import tiny

ROOT = Path(__file__).parents[2]
Run = Callable[..., Ran]


@pytest.fixture
def place(tmp_path: Path, base: Path) -> Path:
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "suite.toml").write_text(suite_text("base"))
    return tmp_path


def iterate(place: Path, iterations: int, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"RUN": str(place / "run"), "CONFIG": str(place / "suite.toml"), "JOBS": "1", "SAMPLE": "", "GATE": ""}
    environment = {**os.environ, "PATH": path, "ITERATIONS": str(iterations), **settings, **variables}
    return subprocess.run(
        ["sh", ROOT / "scripts/iterate.sh"], env=environment, capture_output=True, text=True, check=False
    )


def step(coldctl: Run, place: Path, number: int, *, gate: bool = False) -> None:
    """What the script does in one iteration, in this process."""
    run, config = place / "run", place / "suite.toml"
    folder = run / f"iteration-{number:03d}"
    evaluate = ("evaluate", folder / "fused", "--suite", config, "--jobs", 1)
    commands: list[tuple[object, ...]] = [
        ("finetune", "--suite", config, "--base", run, "--output", run, "--jobs", 1),
        ("fuse", folder / "contributions", "--base", run, "--output", folder / "fused"),
        (*evaluate, "--baseline", place / "base", "--output", folder / "evaluation"),
    ]
    if gate:
        commands.append((*evaluate, "--baseline", run, "--output", folder / "gate"))
    for command in [*commands, ("promote", run)]:
        ran = coldctl(*command)
        assert ran.code == 0, ran.stderr


def test_the_script_runs_a_round_and_then_another(place: Path, coldctl: Run) -> None:
    done = iterate(place, 1)
    assert done.returncode == 0, done.stderr
    assert "average" in done.stderr
    run = place / "run"
    for piece in ("contributions/red", "contributions/green", "fused", "evaluation"):
        assert (run / "iteration-001" / piece / "coldctl.json").exists()
    stamp = (run / "iteration-001" / "fused" / "coldctl.json").stat().st_mtime_ns
    assert coldctl("plan", run, "--config", place / "suite.toml", "--iterations", 1).stdout == "002\n"
    step(coldctl, place, 2)
    assert (run / "iteration-001" / "fused" / "coldctl.json").stat().st_mtime_ns == stamp
    second = json.loads((run / "iteration-002" / "fused" / "coldctl.json").read_text())
    first = json.loads((run / "iteration-001" / "fused" / "coldctl.json").read_text())
    assert second["base"]["body_digest"] == first["body_digest"]
    assert second["iteration"] == 2
    assert [item["kind"] for item in second["ancestors"]] == ["pretrained", "fused"]
    status = coldctl("status", run, "--json").json
    assert [item["promoted"] for item in status["iterations"]] == [True, True]
    assert status["base_model"].endswith("iteration-002/fused")
    assert len(list((run / "cells").glob("*.json"))) == 9  # three models on three datasets, the pretrained one once
    both = coldctl(
        "evaluate",
        run,
        "--suite",
        place / "suite.toml",
        "--baseline",
        place / "base",
        "--output",
        place / "curve",
        "--jobs",
        1,
        "--json",
    )
    assert [model["name"] for model in both.json["models"]] == ["iteration-001", "iteration-002"]
    lineage = coldctl("lineage", run / "iteration-002" / "fused", "--json").json["lineage"]
    assert [len(generation["contributions"]) for generation in lineage] == [0, 2, 2]
    assert "iteration-001" in coldctl("lineage", run).stderr


def test_an_unmet_target_is_finished_and_none_is_added(place: Path, coldctl: Run) -> None:
    run, config = place / "run", place / "suite.toml"
    assert coldctl("plan", run, "--config", config, "--iterations", 2).stdout == "001\n002\n"
    step(coldctl, place, 1)
    assert coldctl("plan", run, "--config", config, "--iterations", 2).stdout == "002\n"
    assert coldctl("plan", run, "--config", config, "--iterations", 5).stdout == "002\n"
    step(coldctl, place, 2)
    assert coldctl("plan", run, "--config", config, "--iterations", 2).stdout == "003\n004\n"


def test_a_first_plan_that_was_killed_stops_nobody(place: Path, coldctl: Run) -> None:
    (place / "run").mkdir()
    (place / "run" / ".run.json.4711.partial").write_text('{"schema": ')
    assert coldctl("plan", place / "run", "--config", place / "suite.toml").stdout == "001\n"
    (place / "other").mkdir()
    (place / "other" / "mine").touch()
    assert coldctl("plan", place / "other", "--config", place / "suite.toml").code == 2


def test_an_interrupted_iteration_repeats_nothing_complete(place: Path, coldctl: Run) -> None:
    run, config = place / "run", place / "suite.toml"
    coldctl("plan", run, "--config", config)
    only = coldctl("finetune", "--suite", config, "--base", run, "--output", run, "--only", "red", "--jobs", 1)
    assert only.code == 0, only.stderr
    red = run / "iteration-001" / "contributions" / "red" / "coldctl.json"
    stamp = red.stat().st_mtime_ns
    (run / "iteration-001" / "contributions" / ".green.partial").mkdir()
    step(coldctl, place, 1)
    assert red.stat().st_mtime_ns == stamp
    uninterrupted = place / "other"
    shutil.copytree(place, uninterrupted, ignore=shutil.ignore_patterns("run", "other"))
    coldctl("plan", uninterrupted / "run", "--config", uninterrupted / "suite.toml")
    step(coldctl, uninterrupted, 1)
    digests = [
        json.loads((where / "run" / "iteration-001" / "fused" / "coldctl.json").read_text())["body_digest"]
        for where in (place, uninterrupted)
    ]
    assert digests[0] == digests[1]


def test_a_config_changed_in_the_middle_is_an_error(place: Path, coldctl: Run) -> None:
    run, config = place / "run", place / "suite.toml"
    coldctl("plan", run, "--config", config)
    coldctl("finetune", "--suite", config, "--base", run, "--output", run, "--only", "red", "--jobs", 1)
    text = config.read_text()
    config.write_text(text.replace("epochs = 1", "epochs = 2"))
    ran = coldctl("plan", run, "--config", config)
    assert ran.code == 2
    assert "changed in the middle of iteration 1" in ran.stderr
    assert f"remove {run / 'iteration-001/contributions/red'} to start" in ran.stderr
    config.write_text("# a comment changes nothing\n" + text)
    assert coldctl("plan", run, "--config", config).code == 0
    step(coldctl, place, 1)
    config.write_text(text.replace("epochs = 1", "epochs = 2"))
    assert coldctl("plan", run, "--config", config).stdout == "002\n"
    config.write_text(text.replace('"./base"', '"./red"'))
    assert coldctl("plan", run, "--config", config).code == 2


def test_contributors_are_sampled_by_seed_and_iteration(place: Path, coldctl: Run) -> None:
    config = place / "suite.toml"
    config.write_text(config.read_text() + "".join(f'[[dataset]]\nname = "d{n}"\npath = "red"\n' for n in range(6)))
    drawn = []
    for run in (place / "run", place / "again"):
        coldctl("plan", run, "--config", config, "--sample", 2)
        ran = coldctl("finetune", "--suite", config, "--base", run, "--output", run, "--jobs", 1, "--json")
        assert ran.code == 0, ran.stderr
        drawn.append([item["name"] for item in ran.json["contributions"]])
    assert len(drawn[0]) == 2
    assert drawn[0] == drawn[1]
    others = []
    for seed in range(1, 6):
        run = place / f"seed-{seed}"
        coldctl("plan", run, "--config", config, "--sample", 2, "--seed", seed)
        stage_jobs = jobs_of_suite(
            read(config).datasets,
            resolve(str(place / "base")),
            run,
            FinetuneConfig(),
            JobOptions(),
        )
        others.append([job.name for job in stage_jobs])
    assert any(other != drawn[0] for other in others)


def test_the_gate_keeps_the_last_good_base(place: Path, coldctl: Run) -> None:
    run, config = place / "run", place / "suite.toml"
    coldctl("plan", run, "--config", config, "--gate")
    step(coldctl, place, 1, gate=True)
    assert coldctl("status", run, "--json").json["iterations"][0]["promoted"] is True
    coldctl("plan", run, "--config", config, "--gate")
    for command in (("finetune", "--suite", config, "--base", run, "--output", run, "--jobs", 1),):
        assert coldctl(*command).code == 0
    folder = run / "iteration-002"
    assert coldctl("fuse", folder / "contributions", "--base", run, "--output", folder / "fused").code == 0
    ran = coldctl("promote", run)
    assert ran.code == 2
    assert "gate" in ran.stderr
    gate = (
        "evaluate",
        folder / "fused",
        "--suite",
        config,
        "--baseline",
        run,
        "--output",
        folder / "gate",
        "--jobs",
        1,
    )
    assert coldctl(*gate).code == 0
    results = folder / "gate" / "results.json"  # a regression beyond doubt, written by hand
    document = json.loads(results.read_text())
    for entry in document["averages"]:
        entry |= {"gain": -5.0, "gain_interval": [-7.0, -3.0], "verdict": "worse"}
    results.write_text(json.dumps(document))
    ran = coldctl("promote", run)
    assert ran.code == 2
    assert "results.json was changed" in ran.stderr
    manifest.write(folder / "gate", manifest.read(folder / "gate"))
    ran = coldctl("promote", run)
    assert ran.code == 0
    assert "not promoted" in ran.stderr
    status = coldctl("status", run, "--json").json
    assert status["base_model"].endswith("iteration-001/fused")
    assert coldctl("plan", run, "--config", config, "--gate").stdout == "003\n"


def test_a_contributor_joins_by_pointing_at_the_run(place: Path, coldctl: Run) -> None:
    run = place / "run"
    coldctl("plan", run, "--config", place / "suite.toml")
    mine = tiny.make_dataset(place / "mine", seed=7)
    ran = coldctl(
        "finetune", mine, "--base", run, "--output", run, "--name", "guest", "--epochs", 1, "--batch-size", 16
    )
    assert ran.code == 0, ran.stderr
    assert (run / "iteration-001" / "contributions" / "guest" / "coldctl.json").exists()
    assert coldctl("status", run, "--json").json["iterations"][0]["contributions"] == ["guest"]
    other = Model("other", str(shutil.copytree(place / "base", place / "other")))  # none of the run's own bases
    assert single_job(config_from_reference(str(mine), DatasetConfig("", "")), other, run, FinetuneConfig(),
                      JobOptions()).iteration == 1  # fmt: skip
    config = place / "suite.toml"  # a guest begins no iteration: the settings may still change
    config.write_text(config.read_text().replace("epochs = 1", "epochs = 2"))
    assert coldctl("plan", run, "--config", config).code == 0


def test_two_promotions_are_one(place: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command decides at this very moment: its decision holds."""
    run = place / "run"
    assert coldctl("plan", run, "--config", place / "suite.toml").code == 0
    shutil.copytree(place / "base", run / "iteration-001" / "fused")
    manifest.write(run / "iteration-001" / "fused", {"kind": "fused", "name": "m", "body_digest": "sha256:" + "0" * 64})
    write = runs.write

    def late(found: runs.Run) -> None:
        write(found)  # by the other one
        write(found)

    monkeypatch.setattr(runs, "write", late)
    ran = coldctl("promote", run)
    assert ran.code == 0, ran.stderr
    assert coldctl("status", run, "--json").json["iterations"][0]["promoted"]

    def broken(_: runs.Run) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(runs, "write", broken)
    shutil.copytree(run / "iteration-001" / "fused", run / "iteration-002" / "fused")
    ran = coldctl("promote", run)
    assert ran.code == 2
    assert "the disk is full" in ran.stderr


def test_a_gate_without_results_keeps_the_decision_open(place: Path, coldctl: Run) -> None:
    run = place / "run"
    assert coldctl("plan", run, "--config", place / "suite.toml", "--gate").code == 0
    for name in ("fused", "gate"):
        folder = Path(shutil.copytree(place / "base", run / "iteration-001" / name))
        config = {"evaluate": {"regression_margin": 1.0}}
        digest = "sha256:" + "0" * 64
        manifest.write(folder, {"kind": "evaluation", "name": "m", "body_digest": digest, "config": config})
    ran = coldctl("promote", run)
    assert ran.code == 2
    assert "results.json: No such file or directory: make the evaluation again" in ran.stderr
    assert coldctl("status", run, "--json").json["iterations"][0]["promoted"] is None


def test_a_run_in_a_store_has_one_pretrained_model(place: Path, coldctl: Run) -> None:
    config, text = place / "suite.toml", (place / "suite.toml").read_text()
    plan = ("plan", "memory://one-pretrained/run", "--config", config)
    assert coldctl(*plan).stdout == "001\n"
    ran = coldctl("plan", "memory://one-pretrained/far", "--config", config)
    assert "is stored in" in ran.stderr
    tiny.perturb(place / "base", place / "other", seed=1)
    config.write_text(text.replace("./base", "./other"))
    ran = coldctl(*plan)
    assert ran.code == 2
    assert "holds another model than" in ran.stderr
    config.write_text(text.replace("./base", "memory://one-pretrained/run/pretrained"))  # where it lies already
    assert coldctl("plan", "memory://one-pretrained/near", "--config", config).code == 0
    status = coldctl("status", "memory://one-pretrained/near", "--json").json
    assert status["pretrained"] == "memory://one-pretrained/run/pretrained"


@pytest.mark.usefixtures("traced_children")
def test_side_by_side_gives_what_one_after_the_other_gives(place: Path, coldctl: Run) -> None:
    """Jobs in worker processes; equal threads per job give equal bytes (one thread each here)."""
    config = place / "suite.toml"
    command = ["finetune", "--suite", config, "--base", place / "base", "--output"]
    for side, jobs in (("alone", 1), ("together", 2)):
        ran = coldctl(*command, place / side, "--jobs", jobs, "--threads", 1)
        assert ran.code == 0, ran.stderr
    for name in ("red", "green"):
        documents = [json.loads((place / side / name / "coldctl.json").read_text()) for side in ("alone", "together")]
        assert documents[0]["body_digest"] == documents[1]["body_digest"]


def test_workers_die_with_their_parent(place: Path, base: Path, coldctl: Run) -> None:
    """A killed command leaves nobody behind who would hold its outputs, and its repetition goes on."""
    config = place / "suite.toml"
    long = config.read_text().replace("epochs = 1", "epochs = 4000\npatience = 1000000")
    (place / "long.toml").write_text(long)
    command = [sys.executable, "-m", "coldctl", "finetune", "--suite", place / "long.toml", "--base", base]
    process = subprocess.Popen(
        [*map(str, command), "--output", str(place / "c"), "--jobs", "2"], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list((place / "c").glob(".*.partial"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(2)
    again = ("finetune", "--suite", config, "--base", base, "--output", place / "c", "--jobs", 1, "--overwrite")
    ran = coldctl(*again)
    assert ran.code == 0, ran.stderr


@dataclass(frozen=True)
class Errand:
    """A job without weights."""

    title: str


def run_errand(job: Errand, threads: int, progress: Progress) -> str:
    progress.note(f"{job.title} with {threads} threads")
    if job.title == "dies":
        os._exit(9)
    if job.title == "lasts":
        time.sleep(60)
    return job.title


def test_a_worker_that_dies_is_an_outcome_and_those_nobody_waits_for_end() -> None:
    notes: list[str] = []

    class Listener:
        def begin(self, task: str, total: int | None, unit: str) -> None: ...
        def advance(self, task: str, steps: int, detail: str = "") -> None: ...
        def end(self, task: str) -> None: ...
        def note(self, message: str) -> None:
            notes.append(message)

    outcomes = list(in_processes(run_errand, [Errand("lives"), Errand("dies")], 1, 1, Listener()))
    assert [(item.index, item.result) for item in outcomes] == [(0, "lives"), (1, None)]
    assert "a worker process died before it was done" in str(outcomes[1].error)
    started = time.monotonic()
    running = in_processes(run_errand, [Errand("lives"), Errand("lasts")], 1, 1, Listener())
    assert next(running).result == "lives"
    while "lasts with 1 threads" not in notes and time.monotonic() - started < 50:
        time.sleep(0.01)
    del running  # as by Ctrl-C
    assert time.monotonic() - started < 50
