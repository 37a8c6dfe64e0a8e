"""The tree of errors.

A message says what is wrong, where, and what to do about it. `details` holds one line per further finding,
for the errors that list all of them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LONGEST = 3000  # characters of a message, which may quote a stranger's file


def _bounded(message: str) -> str:
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"


class ColdctlError(Exception):
    """Any error that is shown as a message instead of a traceback."""

    exit_code = 2

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        self.message = _bounded(message)
        self.details = tuple(map(_bounded, details))
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type["ColdctlError"], tuple[str, tuple[str, ...]]]:
        """Pickle with `details`, for the way back from a worker process."""
        return type(self), (self.message, self.details)


class InputError(ColdctlError):
    """Wrong input or usage (exit code 2)."""


class ConfigError(InputError):
    """A configuration file or flag with an unknown key, a wrong type or an impossible value."""


class DataError(InputError):
    """A dataset that is missing, unreadable, or cannot be learned from."""


class ModelError(InputError):
    """A model that cannot be found, fetched, or used as an encoder."""


class CheckpointError(InputError):
    """A checkpoint whose files are corrupt, unsafe, or do not fit the base model."""


class ManifestError(InputError):
    """A `coldctl.json` or `run.json` that is missing, unreadable, or was changed after it was written."""


class OutputError(InputError):
    """An output that exists with other inputs, is being written by another command, or cannot be written."""


class BusyError(OutputError):
    """An output that another command is writing now."""


class DeclinedError(ColdctlError):
    """Work that ran, with a negative result (exit code 3)."""

    exit_code = 3


class TeamError(DeclinedError):
    """A failure in one of several processes that train together, after which all of them must end."""


class WorkerError(DeclinedError):
    """A worker process that ended without an answer: it was killed, or out of memory."""


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Raise operating system errors that the safetensors library reports in the block as OSError, such as a full disk."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
