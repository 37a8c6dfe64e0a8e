"""Fuzz every parser of strangers' bytes, each in a process of its own, and print what became of the inputs.

    .venv/bin/python scripts/fuzz.py --inputs 100000          # what `make fuzz` runs
    .venv/bin/python scripts/fuzz.py --only csv --seed 3

With atheris (`pip install coldctl[fuzz]`) inputs are chosen by which lines of our code they reach; without it by what our
code says of them. Either way the same seed gives the same inputs. An input that brings out anything but a documented error, or
takes over a second or 200 MB, is kept in `fuzz-findings/` and ends the run with 1.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent.parent
FINDINGS = Path("fuzz-findings")
_LIBFUZZER = 0.3  # share of inputs that libFuzzer mutates in its own ways
_AFRESH = 0.4  # share of the others that start from a sound document
sys.path.insert(0, str(HERE / "tests" / "fuzz"))


def main() -> None:
    """Run all targets, or with `--target` one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="per parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets side by side")
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--report", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.target:
        one(given.target, given.inputs, given.seed, Path(given.report), plain=given.plain)
    else:
        sys.exit(everything(given))


def everything(given: argparse.Namespace) -> int:
    """Start a process per target, some side by side, and print the table. Returns the exit code."""
    from targets import TARGETS

    waiting = [target.name for target in TARGETS if given.only in target.name]
    running: list[tuple[str, Path, subprocess.Popen[str]]] = []
    rows: dict[str, dict[str, Any]] = {}
    failed = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        while waiting or running:
            while waiting and len(running) < given.jobs:
                name = waiting.pop(0)
                report = Path(scratch) / f"{len(rows)}-{len(waiting)}.json"
                command = [
                    sys.executable,
                    __file__,
                    "--target",
                    name,
                    "--report",
                    str(report),
                    "--seed",
                    str(given.seed),
                ]
                command += ["--inputs", str(given.inputs), *(["--plain"] if given.plain else [])]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                running.append((name, report, process))
            name, report, process = running.pop(0)
            said, _ = process.communicate()
            if report.is_file():
                rows[name] = json.loads(report.read_text(encoding="utf-8"))
                print(f"{name}: {rows[name]['inputs']} inputs", file=sys.stderr)
            else:
                failed.append(name)
                print(f"{name}: FAILED\n{said[-4000:]}", file=sys.stderr)
    print(table(list(rows.values())))
    minutes = (time.perf_counter() - started) / 60
    print(
        f"\nseed {given.seed}; {minutes:.0f} minutes; {len(failed)} findings"
        + (f": {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def table(rows: list[dict[str, Any]]) -> str:
    """The tallies in Markdown."""
    head = ["parser", "inputs", "accepted", "refused", "kinds of refusal", "slowest", "memory", "by"]
    lines = [head, ["---", *["--:"] * (len(head) - 2), "---"]]
    lines += [
        [
            row["target"], f"{row['inputs']:,}", f"{row['accepted']:,}", f"{row['refused']:,}", str(row["messages"]),
            f"{1000 * row['slowest']:.0f} ms", f"{row['megabytes']:.0f} MB", row["engine"],
        ]
        for row in rows
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one(name: str, inputs: int, seed: int, report: Path, *, plain: bool) -> None:
    """Fuzz one target in this process and write its tally to `report`; a finding is kept and leaves no report."""
    try:
        if plain:
            raise ImportError
        import atheris
    except ImportError:
        without_atheris(name, inputs, seed, report)
    else:
        with_atheris(atheris, name, inputs, seed, report)


def without_atheris(name: str, inputs: int, seed: int, report: Path) -> None:
    """The project's own generator of inputs."""
    from fuzzing import FindingError, feed_seeded
    from targets import TARGETS

    target = next(target for target in TARGETS if target.name == name)
    try:
        tally = feed_seeded(target, inputs, seed)
    except FindingError as error:
        keep(name, error.data, str(error))
    report.write_text(tally.as_json(), encoding="utf-8")


def with_atheris(atheris: Any, name: str, inputs: int, seed: int, report: Path) -> None:
    """libFuzzer on instrumented code: what reaches new lines is mutated again."""
    with atheris.instrument_imports(include=["coldctl"]):
        from fuzzing import LARGEST, Feeder, FindingError
        from targets import TARGETS

    target = next(target for target in TARGETS if target.name == name)
    feeder = Feeder(target, "atheris")
    corpus = Path(tempfile.mkdtemp(prefix="coldctl-fuzz-"))
    seeds = feeder.begin()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    def feed(data: bytes) -> None:
        try:
            feeder.feed(data)
        except FindingError as error:
            keep(name, error.data, str(error))
        if feeder.tally.inputs >= inputs:
            feeder.measure(data)
            report.write_text(feeder.tally.as_json(), encoding="utf-8")
            feeder.close()
            os._exit(0)  # libFuzzer has no other end that leaves the exit code to us

    def mutate(data: bytes, largest: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < _LIBFUZZER:
            return bytes(atheris.Mutate(data, largest))
        return target.mutate(rng, rng.choice(seeds) if rng.random() < _AFRESH else data)[:largest]

    flags = ["-runs=-1", f"-seed={seed + 1}", f"-max_len={LARGEST}", "-rss_limit_mb=0", "-timeout=60", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], feed, custom_mutator=mutate)
    atheris.Fuzz()


def keep(name: str, data: bytes, words: str) -> NoReturn:
    """Store a finding and end the process."""
    FINDINGS.mkdir(exist_ok=True)
    file = FINDINGS / f"{'-'.join(name.split())}-{hashlib.sha256(data).hexdigest()[:12]}"
    file.write_bytes(data)
    print(f"kept as {file}\n{words[-3000:]}", flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
