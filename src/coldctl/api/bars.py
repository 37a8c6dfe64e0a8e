"""Progress bars in a terminal or a notebook, notes in a log."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from coldctl.common.progress import Progress
from coldctl.common.text import printable

_LOG_WIDTH = 120  # columns of tables in logs, where nothing says how wide the reader is


def stderr_console() -> Console:
    """Return a console on stderr; in a notebook it writes below the cell."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    if not _is_live(console):
        console.width = _LOG_WIDTH
    return console


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """Yield a listener that draws bars where the console can redraw, and else prints the notes only."""
    if not _is_live(console):
        yield _Notes(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
    )
    more = (TimeRemainingColumn(), TextColumn("{task.fields[detail]}", style="dim", markup=False))
    with Bars(*columns, *more, console=console, transient=True) as drawn:
        yield _Bars(drawn)


def say(console: Console, message: str, style: str | None = None) -> None:
    """Print one line of prose. Control codes in it are made harmless."""
    console.print(escape(printable(message)), style=style)


def _is_live(console: Console) -> bool:
    return console.is_terminal or console.is_jupyter


class _Notes:
    """Prints notes only."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, task: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        pass

    def end(self, task: str) -> None:
        pass

    def note(self, message: str) -> None:
        say(self._console, message)


class _Bars:
    """Draws bars with rich; calls may come from several threads."""

    def __init__(self, bars: Bars) -> None:
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

    def note(self, message: str) -> None:
        say(self._bars.console, message)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the terminal to a library that draws bars of its own."""
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()
