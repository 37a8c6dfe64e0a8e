"""Errors of the safetensors library as OSErrors.

It raises an error of its own when a file cannot be written, so a full disk would look like a defect of ours.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Raise the system's errors that the safetensors library met in the block as the OSErrors that they are."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
