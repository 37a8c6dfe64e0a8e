"""What goes wrong outside the program: disks, permissions, files that vanish, clocks, names, two commands at once.

Each ends in one line that says what to do, leaves what was there as it was, and works when the cause is gone. What takes
longer is done by `make test-faults` only, which sets FAULTS=all.
"""

import ctypes
import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from coldctl.artifacts import layout, manifest, output
from coldctl.common.errors import BusyError, CheckpointError, OutputError, as_os_errors
from coldctl.storage.local import LocalFolder
from conftest import FAST, Ran, run_coldctl

Run = Callable[..., Ran]
NOBODY = 65534
ALL = os.environ.get("FAULTS") == "all"
STAGES = ("finetune", "fuse", "evaluate", "publish", "plan")
CHEAP = STAGES if ALL else ("fuse", "publish", "plan")
LONG = STAGES[:-1] if ALL else ("fuse", "publish")


@dataclass(frozen=True)
class Work:
    """Inputs of every stage, complete and small."""

    base: Path
    data: Path
    suite: Path
    contributions: Path
    fused: Path

    def command(self, stage: str, output: Path) -> tuple[object, ...]:
        return {
            "finetune": ("finetune", self.data, "--base", self.base, "--output", output, "--name", "same", *FAST,
                         "--jobs", 1),
            "fuse": ("fuse", self.contributions, "--base", self.base, "--output", output),
            "evaluate": ("evaluate", self.fused, "--suite", self.suite, "--baseline", self.base, "--output", output,
                         "--jobs", 1),
            "publish": ("publish", self.fused, "--to", output, "--license", "mit"),
            "plan": ("plan", output, "--config", self.suite),
        }[stage]  # fmt: skip


@pytest.fixture(scope="module")
def work(workshop: Path, base: Path, dataset: Path, suite: Path, contributions: Path) -> Work:
    fused = workshop / "fused-for-faults"
    ran = run_coldctl("fuse", contributions, "--base", base, "--output", fused)
    assert ran.code == 0, ran.stderr
    return Work(base, dataset, suite, contributions, fused)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(ran: Ran, *words: str) -> None:
    """An error of the design: exit code 2, one line, no traceback."""
    assert ran.code == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ran.stderr
    for word in words:
        assert word in ran.stderr, ran.stderr


# Disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, mounted anew with every set of options it is called with."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    remount, mounted = 32, False

    def mount(options: str, flags: int = 0) -> Path:
        nonlocal mounted
        kind = remount if mounted else 0
        if libc.mount(b"tmpfs", bytes(place), b"tmpfs", kind | flags, options.encode()) != 0:
            pytest.skip(f"no file system may be mounted here: {os.strerror(ctypes.get_errno())}")
        mounted = True
        return place

    yield mount
    if mounted:
        libc.umount2(bytes(place), 2)


@pytest.mark.parametrize("stage", CHEAP)
def test_a_full_disk(stage: str, work: Work, small_disk: Callable[..., Path]) -> None:
    """Really full, at every size between nothing and nearly enough."""
    disk = small_disk("size=32m")
    wanted = run_coldctl(*work.command(stage, disk / "out"))
    assert wanted.code == 0, wanted.stderr
    whole = files_of(disk)
    needed = sum(-(-len(data) // 4096) for data in whole.values())
    pages = {"plan": (1,), "finetune": (2, needed // 2, needed + 8)}.get(stage, (2, needed // 2, needed - 1))
    for number in pages:
        shutil.rmtree(disk / "out")
        (disk / "precious").write_text("mine")
        small_disk(f"size={4096 * (number + 1)}")
        filler = open(disk / "filler", "wb", buffering=0)  # noqa: SIM115, PTH123
        with filler, suppress(OSError):
            while stage == "plan" and filler.write(bytes(4096)):
                pass
        ran = run_coldctl(*work.command(stage, disk / "out"))
        one_line(ran, "No space left on device")
        assert not layout.is_complete(disk / "out")
        assert not (disk / "out" / layout.RUN).exists()
        assert (disk / "precious").read_text() == "mine"
        (disk / "filler").unlink()
        (disk / "precious").unlink()
        small_disk("size=32m")
        again = run_coldctl(*work.command(stage, disk / "out"))
        assert again.code == 0, again.stderr
        assert files_of(disk).keys() == whole.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_a_limit_on_the_size_of_files(stage: str, work: Work, tmp_path: Path) -> None:
    """What a disk that fills up does, without the rights to mount one: the last piece is written in part."""
    wanted = run_coldctl(*work.command(stage, tmp_path / "whole"))
    assert wanted.code == 0, wanted.stderr
    largest = max(len(data) for data in files_of(tmp_path / "whole").values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        ran = run_coldctl(*work.command(stage, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_line(ran, "File too large")
    assert not layout.is_complete(tmp_path / "out")
    again = run_coldctl(*work.command(stage, tmp_path / "out"))
    assert again.code == 0, again.stderr
    assert files_of(tmp_path / "out").keys() == files_of(tmp_path / "whole").keys()


@pytest.mark.parametrize("stage", CHEAP)
def test_a_read_only_disk(stage: str, work: Work, small_disk: Callable[..., Path]) -> None:
    disk = small_disk("size=32m")
    (disk / "precious").write_text("mine")
    small_disk("size=32m", flags=1)
    one_line(run_coldctl(*work.command(stage, disk / "out")), "Read-only file system")
    assert files_of(disk) == {"precious": b"mine"}


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may do everything, so for a while this process is somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that everybody can reach."""
    with tempfile.TemporaryDirectory(prefix="coldctl-") as name:
        place = Path(name)
        place.chmod(0o755)
        yield place


@pytest.fixture
def reachable(work: Work, open_place: Path) -> Work:
    """The inputs where everybody can read them."""
    return moved(work, open_place)


def moved(work: Work, place: Path) -> Work:
    """The inputs under another directory."""
    copied = {name: place / source.name for name, source in vars(work).items()}
    for name, source in vars(work).items():
        if source.is_dir():
            shutil.copytree(source, copied[name])
        else:
            shutil.copy(source, copied[name])
    for name in ("red", "green", "blue"):
        shutil.copytree(work.suite.parent / name, place / name)
    for path in place.rglob("*"):
        path.chmod(path.stat().st_mode | 0o444)  # some libraries write for the owner alone
    return Work(**copied)


@pytest.mark.parametrize("stage", CHEAP)
def test_permission_denied(stage: str, reachable: Work, open_place: Path) -> None:
    """First to write, then to read one of the inputs."""
    closed, ours = open_place / "closed", open_place / "ours"
    closed.mkdir(mode=0o555)
    ours.mkdir()
    ours.chmod(0o777)
    before = files_of(open_place)
    with as_nobody():
        ran = run_coldctl(*reachable.command(stage, closed / "out"))
    one_line(ran, "Permission denied")
    read = {
        "finetune": reachable.data / "train.jsonl", "fuse": reachable.contributions / "two" / layout.WEIGHTS,
        "evaluate": reachable.fused / layout.WEIGHTS, "publish": reachable.fused / "tokenizer.json",
        "plan": reachable.suite,
    }[stage]  # fmt: skip
    mode = read.stat().st_mode
    read.chmod(0)
    with as_nobody():
        ran = run_coldctl(*reachable.command(stage, ours / "out"))
    one_line(ran, "Permission denied", str(read))
    read.chmod(stat.S_IMODE(mode))
    assert files_of(open_place) == before
    with as_nobody():
        assert run_coldctl(*reachable.command(stage, ours / "out")).code == 0


# Files that vanish ----------------------------------------------------------------------------------------------


class Vanishing:
    """Takes a file away (or cuts it short) when it is opened for the n-th time."""

    def __init__(self) -> None:
        self.path: str = ""
        self.countdown = 0
        self.cut = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.path and event == "open" and arguments[0] == self.path:
            self.countdown -= 1
            if self.countdown == 0:
                path, self.path = self.path, ""
                if self.cut:
                    os.truncate(path, Path(path).stat().st_size // 2)
                else:
                    Path(path).unlink()

    @classmethod
    def serve(cls, requests: Connection) -> None:
        """Run commands, with a file that vanishes, and say how each ended and whether the file went."""
        vanishing = cls()
        sys.addaudithook(vanishing)
        while True:
            command, vanishing.path, vanishing.countdown, vanishing.cut = requests.recv()
            watching = bool(vanishing.path)
            ran = run_coldctl(*command)
            requests.send((ran, watching and not vanishing.path))


Vanish = Callable[[tuple[object, ...], Path, int, bool], tuple[Ran, bool]]


@pytest.fixture(scope="module")
def vanish() -> Iterator[Vanish]:
    """A process of its own: an audit hook cannot be taken away again, and disturbs what traces threads (coverage)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=Vanishing.serve, args=(there,), daemon=True)
    process.start()

    def run(command: tuple[object, ...], path: Path, number: int, cut: bool) -> tuple[Ran, bool]:
        here.send((command, str(path), number, cut))
        ran, gone = here.recv()
        return ran, gone

    yield run
    process.kill()
    process.join()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("stage", LONG)
def test_a_file_that_vanishes_in_the_middle(stage: str, cut: bool, work: Work, tmp_path: Path, vanish: Vanish) -> None:
    """Between any two looks at it. What was read before may be enough; what was not is missed in one line."""
    mine = moved(work, tmp_path)
    path = {
        "finetune": mine.base / layout.WEIGHTS, "fuse": mine.contributions / "two" / layout.WEIGHTS,
        "evaluate": mine.suite.parent / "blue" / "test.jsonl", "publish": mine.fused / "tokenizer.json",
    }[stage]  # fmt: skip
    whole = path.read_bytes()
    failed = 0
    for number in range(1, 9):
        place = tmp_path / f"out-{number}"
        ran, gone = vanish(mine.command(stage, place), path, number, cut)
        if not gone:
            break
        path.write_bytes(whole)
        if ran.code != 0:
            failed += 1
            one_line(ran)
            assert not layout.is_complete(place)
            assert run_coldctl(*mine.command(stage, place)).code == 0
        assert manifest.read_unchanged(place)
    assert failed >= 1


# Clocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("years", [-60, 80])
def test_a_clock_that_jumps(years: int, work: Work, tmp_path: Path) -> None:
    """Files from the future or from before the epoch, and a clock that goes back at every look, change nothing."""
    mine = moved(work, tmp_path)
    for path in tmp_path.rglob("*"):
        os.utime(path, (years * 3e7, years * 3e7), follow_symlinks=False)
    code = (
        "import time, itertools; steps = itertools.count()\n"
        f"now = time.time(); time.time = lambda: now + {years} * 3e7 * (next(steps) % 3 - 1)\n"
        "from coldctl.cli.app import main; import sys\n"
        "sys.argv = ['coldctl', *sys.argv[1:]]; main()"
    )
    command = mine.command("fuse", tmp_path / "out")
    ran = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    made, known = manifest.read_unchanged(tmp_path / "out"), manifest.read(work.fused)
    assert made["body_digest"] == known["body_digest"]
    for stage in ("finetune", "evaluate") if ALL else ("publish",):
        assert run_coldctl(*mine.command(stage, tmp_path / stage)).code == 0
        again = run_coldctl(*mine.command(stage, tmp_path / stage))
        assert again.code == 0
        assert "left alone" in again.stderr


def test_only_clocks_that_never_go_back_measure_time() -> None:
    """`time.time` and `datetime.now` may be set by anybody; one place asks them, to write a date down."""
    source = Path(manifest.__file__).parents[1]
    asking = {
        path.name for path in source.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in ("time.time(", "datetime.now(", "utcnow("))
    }  # fmt: skip
    assert asking <= {"manifest.py"}


# Names ----------------------------------------------------------------------------------------------------------

NAMES = ("with two  spaces", "-leading", "e\u0301-decomposed", "\u00e9-composed", "🦊", "a'b\"c", "50% #1?", "[bold]x")


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage with such a name in front of, and as, everything it is given."""
    mine = moved(work, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    relative = Path(name)
    for stage in ("fuse", "publish", "plan"):
        ran = run_coldctl(*mine.command(stage, tmp_path / f"{name} {stage}" / relative))
        assert ran.code == 0, ran.stderr
    one = tmp_path / f"{name} fuse" / relative
    assert manifest.read_unchanged(one)["body_digest"] == manifest.read(work.fused)["body_digest"]
    assert manifest.read(one)["name"] == name
    assert run_coldctl("check", tmp_path / f"{name} publish", "--base", mine.base, "--deep").code == 0
    assert run_coldctl("lineage", one).code == 0


# Two commands on one output -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", LONG)
def test_two_commands_on_one_output(stage: str, work: Work, tmp_path: Path) -> None:
    partial = layout.partial(tmp_path / "out")
    partial.mkdir()
    lock = os.open(str(partial), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (partial / "theirs").write_text("mine")
    one_line(run_coldctl(*work.command(stage, tmp_path / "out"), "--overwrite"), "being written by another command")
    assert (partial / "theirs").read_text() == "mine"
    (partial / "theirs").unlink()
    os.close(lock)
    assert run_coldctl(*work.command(stage, tmp_path / "out")).code == 0


def test_what_was_written_to_the_last_file_is_only_made_visible(work: Work, tmp_path: Path) -> None:
    """A kill between the last byte and the rename: nothing is computed again."""
    command = work.command("finetune", tmp_path / "out")
    assert run_coldctl(*command).code == 0
    identity = manifest.read(tmp_path / "out")["identity"]
    weights = tmp_path / "out" / layout.WEIGHTS
    made = weights.stat()
    partial = (tmp_path / "out").rename(tmp_path / ".out.partial")
    (partial / layout.IDENTITY).write_text(f"{identity} whole")
    ran = run_coldctl(*command)
    assert "left alone" in ran.stderr
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert not (tmp_path / "out" / layout.IDENTITY).exists()
    partial = (tmp_path / "out").rename(partial)  # the same, but damaged, is not
    (partial / layout.IDENTITY).write_text(f"{identity} whole")
    data = bytearray((partial / layout.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (partial / layout.WEIGHTS).write_bytes(data)
    ran = run_coldctl(*command)
    assert ran.code == 0
    assert "left alone" not in ran.stderr
    assert manifest.read_unchanged(tmp_path / "out")


def test_an_output_that_was_completed_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Between the look at it and the lock on it another command may have come and gone."""
    place = tmp_path / "out"
    assert not output.is_done(place, "mine", overwrite=False)
    with output.atomic_output(place, "theirs", overwrite=False) as partial:
        manifest.write(partial, {"kind": "fused", "name": "m", "body_digest": "x", "identity": "theirs"})
    with (
        pytest.raises(BusyError, match="completed by another command"),
        output.atomic_output(place, "mine", overwrite=False),
    ):
        pass
    assert manifest.read(place)["identity"] == "theirs"


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("call", "replaced", "words"),
    [
        ("preadv", failing(errno.EIO), "Input/output error"),
        ("preadv", lambda *_: 0, "ends at byte 0: it is truncated, fetch it again"),
        ("scandir", failing(errno.EACCES), "Permission denied"),
    ],
    ids=["error", "end", "list"],
)
def test_a_disk_that_does_not_read(
    call: str, replaced: Any, words: str, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LocalFolder(work.base)
    monkeypatch.setattr(os, call, replaced)
    with pytest.raises(CheckpointError, match=words):
        folder.read(layout.MODEL_CONFIG) if call == "preadv" else folder.names()


def test_one_that_cannot_be_read_hides_no_other(
    contributions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = Path(shutil.copytree(contributions, tmp_path / "c")), os.preadv
    weights = folder / "two" / layout.WEIGHTS
    data = 8 + int.from_bytes(weights.read_bytes()[:8], "little")

    def torn(descriptor: int, buffers: Any, offset: int) -> int:
        if offset >= data and Path(f"/proc/self/fd/{descriptor}").samefile(weights):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", torn)
    ran = run_coldctl("check", folder, "--deep", "--json")
    assert ran.code == 3
    assert ran.stdout.count("Input/output error") == 1
    for name in ("one", "three"):
        assert run_coldctl("check", folder / name, "--deep").code == 0


def test_unfinished_work_of_another_config_is_dropped_only_if_told_to(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / layout.IDENTITY).write_text("another")
    (partial / "theirs").write_text("mine")
    ran = run_coldctl(*work.command("finetune", tmp_path / "out"))
    one_line(ran, "holds unfinished work on out under another config or other inputs")
    assert (partial / "theirs").read_text() == "mine"
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOTSUP))  # a file system without locks is no obstacle
    ran = run_coldctl(*work.command("finetune", tmp_path / "out"), "--overwrite")
    assert ran.code == 0, ran.stderr
    assert not (tmp_path / "out" / "theirs").exists()
    (tmp_path / "out").rename(partial)
    identity = manifest.read(partial)["identity"]
    (partial / layout.IDENTITY).write_text(f"{identity} whole")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))  # nor was all of it on the disk
    with pytest.raises(OutputError, match="No space left on device"):
        output.is_done(tmp_path / "out", identity, overwrite=False)
    monkeypatch.undo()
    lock = fcntl.flock

    def meanwhile(*arguments: Any) -> None:
        (partial / layout.IDENTITY).unlink()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    assert not output.is_done(tmp_path / "out", identity, overwrite=False)

    def finished(*arguments: Any) -> None:
        partial.rename(tmp_path / "out")
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", finished)  # what was locked is the output of another by now
    with (
        pytest.raises(BusyError, match="being written by another command"),
        output.atomic_output(tmp_path / "out", identity, overwrite=True),
    ):
        pass


def test_a_small_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "plan.toml").write_text("")
    for path in (tmp_path / "taken", tmp_path / "plan.toml" / "below"):
        with pytest.raises(OutputError, match=f"cannot write {path}: .*: free the cause"):
            output.write_text(path, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.toml", "taken"]


def test_what_is_no_fault_of_the_disk_stays_what_it_is() -> None:
    from safetensors import SafetensorError

    with pytest.raises(SafetensorError, match="odd"), as_os_errors():
        raise SafetensorError("odd")
    with pytest.raises(OSError, match="No space left on device"), as_os_errors():
        raise SafetensorError("I/O error: whatever (os error 28)")
