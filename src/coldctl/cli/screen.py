"""The terminal: progress bars, messages and tables on stderr, and with --json one JSON document on stdout."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from coldctl.common.errors import ColdctlError, TeamError
from coldctl.common.progress import Progress, Silent
from coldctl.common.text import json_document, printable

_LOG_WIDTH = 120  # characters per line of tables, where no terminal states its width


class Screen:
    """The terminal. Nothing else writes to it."""

    def __init__(self, *, as_json: bool = False, silent: bool = False, mute: bool = False) -> None:
        self.as_json = as_json
        self._silent = silent
        self._mute = mute
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        if not self._errors.is_terminal:
            self._errors.width = _LOG_WIDTH

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield a listener for commands: bars if stderr is a terminal, else lines of prose, and nothing with --quiet."""
        if self._silent:
            yield Silent()
            return
        if not self._errors.is_terminal:
            yield _Prose(self)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
        )
        more = (TimeRemainingColumn(), TextColumn("{task.fields[detail]}", style="dim", markup=False))
        with Bars(*columns, *more, console=self._errors, transient=True) as bars:
            yield _Bars(bars, self)

    def say(self, message: str, style: str | None = None) -> None:
        """Print one line on stderr, unless --quiet. A stranger's control codes are replaced."""
        if not self._silent:
            self._errors.print(escape(printable(message)), style=style)

    def show(self, *renderables: Any) -> None:
        """Print tables and trees on stderr, so that stdout stays free for --json and pipes."""
        if not self._silent:
            for renderable in renderables:
                self._errors.print(renderable)

    def result(self, document: Any) -> None:
        """Print the JSON document of --json."""
        if self.as_json:
            sys.stdout.write(json_document(document, default=_as_builtin) + "\n")

    def error(self, error: ColdctlError) -> None:
        """Print an error in one line, and its details below it."""
        if self.as_json:
            self.result({"error": error.message, "details": list(error.details), "exit_code": error.exit_code})
        if self._mute and not isinstance(error, TeamError):
            return
        self._errors.print(f"[bold red]error:[/] {escape(printable(error.message))}")
        for detail in error.details:
            self._errors.print(f"  - {escape(printable(detail))}")


class _Prose(Silent):
    """A listener without a terminal: only notes are printed."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def note(self, message: str) -> None:
        self._screen.say(message)


class _Bars(_Prose):
    """A listener that draws bars with rich; calls may come from several threads."""

    def __init__(self, bars: Bars, screen: Screen) -> None:
        super().__init__(screen)
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def begin(self, task: str, total: int | None, unit: str) -> None:
        with self._lock:
            self._tasks[task] = self._bars.add_task(escape(printable(task)), total=total, unit=unit, detail="")

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        with self._lock:
            if task in self._tasks:
                fields = {"detail": printable(detail)} if detail else {}
                self._bars.update(self._tasks[task], advance=steps, **fields)  # type: ignore[arg-type]

    def end(self, task: str) -> None:
        with self._lock:
            if task in self._tasks:
                self._bars.remove_task(self._tasks.pop(task))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Clear the bars while a library draws its own."""
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()


def _as_builtin(value: Any) -> Any:
    """Return a path or dataclass in a command's result as JSON can hold it. Raises TypeError for anything else."""
    return str(value) if isinstance(value, Path) else asdict(value)
