"""Error boundary: errors of a command become one line and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer

from coldctl.cli.options import Common
from coldctl.common.errors import ColdctlError, OutputError
from coldctl.storage.location import raised_by_store

if TYPE_CHECKING:
    from coldctl.cli.screen import Screen

INTERRUPTED = 130


def interrupted() -> NoReturn:
    """End the process as Ctrl-C should: with one line and exit code 130."""
    sys.stderr.write("interrupted: run the same command again to go on; what was complete is not repeated\n")
    sys.exit(INTERRUPTED)


@contextmanager
def boundary(common: Common, *, mute: bool = False) -> "Iterator[Screen]":
    """Turn errors into a line and an exit code. A `mute` process leaves all output to the one that leads it."""
    from coldctl.cli.screen import Screen

    screen = Screen(as_json=common.as_json and not mute, silent=common.quiet or mute, mute=mute)
    try:
        yield screen
    except KeyboardInterrupt:
        interrupted()
    except ColdctlError as error:
        screen.error(error)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        screen.error(OutputError(f"{where}{error.strerror or error}: free the cause and run the same command again"))
        raise typer.Exit(OutputError.exit_code) from None
    except Exception as error:
        if not raised_by_store(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        screen.error(OutputError(f"the store does not answer as it should ({reason}): run the same command again"))
        raise typer.Exit(OutputError.exit_code) from None
