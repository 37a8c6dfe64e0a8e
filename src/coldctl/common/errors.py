"""The tree of errors.

A message says what is wrong, where, and what to do about it. `details` holds one line per further finding,
for the errors that list all of them.
"""

from collections.abc import Sequence

_LONGEST = 3000  # characters of a message; one that quotes a stranger's file could have millions


def _bounded(message: str) -> str:
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"


class ColdctlError(Exception):
    """Anything that a user is told in words instead of a traceback."""

    exit_code = 2

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        self.message = _bounded(message)
        self.details = tuple(map(_bounded, details))
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type["ColdctlError"], tuple[str, tuple[str, ...]]]:
        """Keep `details` on the way back from a worker process."""
        return type(self), (self.message, self.details)


class InputError(ColdctlError):
    """The caller's input or usage is wrong (exit code 2)."""


class ConfigError(InputError):
    """A configuration file or flag has an unknown key, a wrong type or an impossible value."""


class DataError(InputError):
    """A dataset is missing, unreadable, or cannot be learned from."""


class ModelError(InputError):
    """A model reference that cannot be found, fetched, or used as an encoder."""


class CheckpointError(InputError):
    """A checkpoint's files are corrupt, unsafe, or do not fit the base model."""


class ManifestError(InputError):
    """A `coldctl.json` or `run.json` that is missing, unreadable, or was changed after it was written."""


class OutputError(InputError):
    """An output that exists with other inputs, is being written by another command, or cannot be written."""


class BusyError(OutputError):
    """An output that a living command is writing at this moment: wait, and it may be there."""


class DeclinedError(ColdctlError):
    """The work ran and the answer is no (exit code 3)."""

    exit_code = 3


class TeamError(DeclinedError):
    """One of several processes that train together failed where the others cannot know: all of them must end."""


class WorkerError(DeclinedError):
    """A worker process ended without an answer, killed from outside or out of memory."""
