"""Progress: how a command reports its work without knowing who listens.

Functions get a `Progress` and never print. `api/bars.py` draws it; `SILENT` drops it.
"""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable


class Progress(Protocol):
    """Receives what happens in a command. Calls come from one process, possibly from several threads."""

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """Start (or restart) a bar called `task` that counts to `total` in `unit`; None if the end is unknown."""

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        """Count `steps` more units of `task`; `detail` replaces the short text beside the bar."""

    def end(self, task: str) -> None:
        """Remove the bar."""

    def note(self, message: str) -> None:
        """Print one line that stays on the screen."""


@runtime_checkable
class Drawing(Progress, Protocol):
    """A listener that draws on a terminal, and lets a library draw there for a while."""

    def aside(self) -> AbstractContextManager[None]:
        """Draw nothing until the block ends."""


class Silent:
    """A listener that ignores everything."""

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """Ignore the start."""

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        """Ignore the steps."""

    def end(self, task: str) -> None:
        """Ignore the end."""

    def note(self, message: str) -> None:
        """Ignore the message."""


SILENT: Progress = Silent()
