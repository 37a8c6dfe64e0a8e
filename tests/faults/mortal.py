"""Running a shell script whose `coldctl` processes end at chosen moments, cheaply.

Importing torch takes seconds, a tiny stage takes a tenth of one. So the process that runs the tests imports everything
once, the `coldctl` that the script finds is a shim that hands its arguments and its files over, and every command runs in
a fork: real code in a real process of the script's own process group, which ends by a real signal.

A process can be ended before its n-th change to the file system (`call`), in the middle of the write that makes a file
longer than n bytes (`bytes`), or after a time (`time`).
"""

import array
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

Kind = Literal["call", "bytes", "time"]
KINDS: tuple[Kind, ...] = ("call", "bytes", "time")

# What changes a file system, as the interpreter's audit events call it; `open` for writing and `fsync` are counted, too.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_SHIM = """#!{python} -IS
import array, json, os, socket, sys
door = socket.socket(socket.AF_UNIX)
door.connect({door!r})
words = json.dumps([os.getcwd(), sys.argv[1:]]).encode()
door.sendmsg([words], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
door.shutdown(socket.SHUT_WR)
answer = door.recv(64)
sys.exit(int(answer.split()[0]) if answer else 137)
"""


@dataclass(frozen=True)
class Moment:
    """When a process ends: at the n-th change, at the byte, or after so many seconds."""

    kind: Kind
    at: float


@dataclass(frozen=True)
class Ended:
    """How one `coldctl` of the script ended: its exit code, or None if it was killed."""

    arguments: tuple[str, ...]
    code: int | None
    changes: int
    seconds: float


@dataclass(frozen=True)
class Script:
    """How the script ended, what it said, and its commands in order."""

    code: int
    output: str
    commands: tuple[Ended, ...]

    @property
    def killed(self) -> bool:
        """Whether its last command was."""
        return bool(self.commands) and self.commands[-1].code is None


Choose = Callable[[Sequence[str]], Moment | None]


def warm() -> None:
    """Import what the stages import, without starting a thread of torch's: a fork would not have it."""

    for name in (
        "coldctl.cli.app",
        "coldctl.training.model",
        "coldctl.evaluation.probe",
        "coldctl.publishing.load_check",
        "coldctl.training.loop",
        "coldctl.commands.evaluate",
        "coldctl.commands.finetune",
        "coldctl.commands.fuse",
        "coldctl.commands.plan",
        "coldctl.commands.publish",
    ):
        importlib.import_module(name)


def run(
    script: str, folder: Path, environment: Mapping[str, str], choose: Choose, append: Mapping[str, Sequence[str]]
) -> Script:
    """Run a shell script; `choose` says of each command's arguments when it is to be killed, if at all.

    `folder` takes the shim and its socket; `append` are arguments that a stage gets in addition.
    """
    folder.mkdir(parents=True, exist_ok=True)
    door, shim = folder / "door", folder / "coldctl"
    door.unlink(missing_ok=True)
    shim.write_text(_SHIM.format(python=sys.executable, door=str(door)))
    shim.chmod(0o755)
    commands: list[Ended] = []
    with socket.socket(socket.AF_UNIX) as listener, (folder / "output").open("w+") as output:
        listener.bind(str(door))
        listener.listen()
        process = subprocess.Popen(
            ["sh", "-c", script], env={**os.environ, **environment, "PATH": f"{folder}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
        assert process.stdout is not None
        while True:
            stdout = process.stdout.fileno()
            ready, _, _ = select.select([listener.fileno(), stdout], [], [])
            if listener.fileno() in ready:
                commands.append(_serve(listener, process, environment, choose, append, output))
                if commands[-1].code is None:
                    _end(process)
            if stdout in ready:
                said = os.read(stdout, 1 << 16)
                output.write(said.decode(errors="replace"))
                if not said:
                    break
        _end(process)
        process.stdout.close()
        output.seek(0)
        return Script(process.wait(), output.read(), tuple(commands))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End whatever is left of the script's group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _serve(
    listener: socket.socket,
    process: "subprocess.Popen[bytes]",
    environment: Mapping[str, str],
    choose: Choose,
    append: Mapping[str, Sequence[str]],
    output: Any,
) -> Ended:
    """Take one command from the shim, run it in a fork, and say how it ended."""
    connection, _ = listener.accept()
    with connection:
        words, files = b"", array.array("i")
        while True:
            part, extra, _, _ = connection.recvmsg(1 << 16, socket.CMSG_LEN(3 * files.itemsize))
            for _, _, data in extra:
                files.frombytes(data)
            words += part
            if not part:
                break
        where, arguments = json.loads(words)
        arguments += append.get(arguments[0], ())
        moment = choose(arguments)
        started = time.perf_counter()
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            listener.close()
            _be_the_command(where, arguments, files, process.pid, environment, moment, writing)
        os.close(writing)
        for descriptor in files:
            os.close(descriptor)
        os.setpgid(child, process.pid)
        answer = _answer(reading, process, output)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if code >= 0:
            try:
                connection.sendall(f"{code}\n".encode())
            except (BrokenPipeError, ConnectionResetError):  # the script was killed as its command ended by itself
                code = -signal.SIGKILL
        return Ended(tuple(arguments), code if code >= 0 else None, int(answer or 0), seconds)


def _answer(reading: int, process: "subprocess.Popen[bytes]", output: Any) -> bytes:
    """What the command says at its end (nothing if it is killed); meanwhile the script's output must not get stuck."""
    assert process.stdout is not None
    stdout = process.stdout.fileno()
    watched = [reading, stdout]
    answer = b""
    while True:
        ready, _, _ = select.select(watched, [], [])
        if stdout in ready:
            said = os.read(stdout, 1 << 16)
            output.write(said.decode(errors="replace"))
            if not said:
                watched.remove(stdout)
        if reading in ready:
            part = os.read(reading, 64)
            answer += part
            if not part:
                os.close(reading)
                return answer


def _be_the_command(
    where: str,
    arguments: Sequence[str],
    files: Sequence[int],
    group: int,
    environment: Mapping[str, str],
    moment: Moment | None,
    answer: int,
) -> NoReturn:
    """In the fork: what the console script does, under the moment that was chosen."""
    code = 1
    try:
        os.setpgid(0, group)
        os.chdir(where)
        os.environ.update(environment)
        for target, descriptor in enumerate(files):
            os.dup2(descriptor, target)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
        sys.argv = ["coldctl", *arguments]
        os.sched_setaffinity(
            0, random.sample(sorted(os.sched_getaffinity(0)), 1)
        )  # equal threads, whoever else is busy
        changes = _count(moment.at if moment and moment.kind == "call" else None, group)
        if moment and moment.kind == "bytes":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment.at), int(moment.at)))
        if moment and moment.kind == "time":
            _end_after(moment.at, group, answer)
        from coldctl.cli.app import main

        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(answer, str(changes[0]).encode())
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _count(last: float | None, group: int) -> list[int]:
    """Count changes to the file system; end the group before the one with the number `last`."""
    changes = [0]

    def change() -> None:
        changes[0] += 1
        if last is not None and changes[0] >= last:
            os.killpg(group, signal.SIGKILL)
            time.sleep(60)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
            change()

    fsync = os.fsync

    def counted(descriptor: Any) -> None:
        change()
        fsync(descriptor)
        change()

    os.__dict__["fsync"] = counted
    sys.addaudithook(hook)
    return changes


def _end_after(seconds: float, group: int, answer: int) -> None:
    """A child of the command's that ends the whole group, unless the command ends first."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.close(answer)
        ready, _, _ = select.select([reading], [], [], seconds)
        if not ready:
            os.killpg(group, signal.SIGKILL)
        os._exit(0)
    os.close(reading)
