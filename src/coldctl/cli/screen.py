"""What a person sees: progress bars and prose on stderr, one JSON document or tables, never both on stdout."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from coldctl.common.errors import ColdctlError, TeamError
from coldctl.common.progress import SILENT, Progress
from coldctl.common.text import json_document, printable

_LOG_WIDTH = 120  # columns of tables in logs, where nothing says how wide the reader is


class Screen:
    """The one place that writes to the terminal."""

    def __init__(self, *, as_json: bool = False, silent: bool = False, mute: bool = False) -> None:
        self.as_json = as_json
        self._silent = silent
        self._mute = mute
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        if not self._errors.is_terminal:
            self._errors.width = _LOG_WIDTH

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A listener for stages: bars while stderr is a terminal, lines of prose otherwise, nothing with --quiet."""
        if self._silent:
            yield SILENT
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
        """One line of prose on stderr, unless --quiet. A stranger's control codes are made harmless."""
        if not self._silent:
            self._errors.print(escape(printable(message)), style=style)

    def show(self, *renderables: Any) -> None:
        """Tables and trees for people: on stderr, so that stdout stays free for --json and pipes."""
        if not self._silent:
            for renderable in renderables:
                self._errors.print(renderable)

    def result(self, document: Any) -> None:
        """The JSON document of --json."""
        if self.as_json:
            sys.stdout.write(json_document(_plain(document)) + "\n")

    def error(self, error: ColdctlError) -> None:
        """An error in one line, with the findings it lists below it."""
        if self.as_json:
            self.result({"error": error.message, "details": list(error.details), "exit_code": error.exit_code})
        if self._mute and not isinstance(error, TeamError):
            return
        self._errors.print(f"[bold red]error:[/] {escape(printable(error.message))}")
        for detail in error.details:
            self._errors.print(f"  - {escape(printable(detail))}")


class _Prose:
    """Without a terminal only the notes are said."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def begin(self, task: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        pass

    def end(self, task: str) -> None:
        pass

    def note(self, message: str) -> None:
        self._screen.say(message)


class _Bars:
    """Draws bars with rich; calls may come from several threads."""

    def __init__(self, bars: Bars, screen: Screen) -> None:
        self._bars = bars
        self._screen = screen
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

    def note(self, message: str) -> None:
        self._screen.say(message)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the terminal to a library that draws bars of its own."""
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
