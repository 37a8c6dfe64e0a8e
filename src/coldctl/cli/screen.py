"""Terminal output: progress bars, notes, tables, or one JSON document."""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from coldctl.api.bars import bars, say, stderr_console
from coldctl.common.errors import ColdctlError, TeamError
from coldctl.common.progress import SILENT, Progress
from coldctl.common.text import json_document, printable


class Screen:
    """The one place that writes to the terminal."""

    def __init__(self, *, as_json: bool = False, silent: bool = False, mute: bool = False) -> None:
        self.as_json = as_json
        self._silent = silent
        self._mute = mute
        self._errors = stderr_console()

    def progress(self) -> AbstractContextManager[Progress]:
        """Return a listener for commands: bars while stderr is a terminal, notes otherwise, nothing with --quiet."""
        return nullcontext(SILENT) if self._silent else bars(self._errors)

    def say(self, message: str, style: str | None = None) -> None:
        """Write one line of prose to stderr, unless --quiet. A stranger's control codes are made harmless."""
        if not self._silent:
            say(self._errors, message, style)

    def show(self, *renderables: Any) -> None:
        """Print tables and trees on stderr, so that stdout stays free for --json and pipes."""
        if not self._silent:
            for renderable in renderables:
                self._errors.print(renderable)

    def result(self, document: Any) -> None:
        """Write the JSON document of --json."""
        if self.as_json:
            sys.stdout.write(json_document(_plain(document)) + "\n")

    def error(self, error: ColdctlError) -> None:
        """Write an error in one line, and the findings it lists below it."""
        if self.as_json:
            self.result({"error": error.message, "details": list(error.details), "exit_code": error.exit_code})
        if self._mute and not isinstance(error, TeamError):
            return
        self._errors.print(f"[bold red]error:[/] {escape(printable(error.message))}")
        for detail in error.details:
            self._errors.print(f"  - {escape(printable(detail))}")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
