"""Leases: hold a place in a store, so that two commands do not do the same work.

The holder renews a small file every few seconds. Whoever finds the file watches it for one lease: if it changes, the
holder is alive; if not, the holder is gone and the file is taken over by a conditional write. No clock of another
machine is ever compared with one's own.
"""

import json
import os
import threading
import time
import uuid
from contextlib import suppress

from coldctl.common.errors import BusyError, OutputError
from coldctl.storage import conditional_write
from coldctl.storage.conditional_write import Version
from coldctl.storage.location import Location

_SECONDS = 30.0


def seconds() -> float:
    """How long a holder may be silent before it counts as gone: `$COLDCTL_LEASE_SECONDS`, else 30."""
    try:
        return max(0.1, float(os.environ.get("COLDCTL_LEASE_SECONDS", _SECONDS)))
    except ValueError:
        return _SECONDS


class Lease:
    """A hold on `path`, renewed by a thread until it is released."""

    def __init__(self, path: Location, subject: str) -> None:
        """Take `path`; `subject` is what messages call the thing that is held.

        Raises BusyError if a living command holds it.
        """
        self._path = path
        self._subject = subject
        self._holder = uuid.uuid4().hex
        self._beats = 0
        self._guard = threading.Lock()
        self._version = self._taken()
        self._renewed_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="coldctl-lease")
        self._thread.start()

    def check(self) -> None:
        """Renew now. Raises OutputError if another command has taken over."""
        if not self._renewed():
            raise OutputError(
                f"{self._subject} was taken over by another command, because this one was silent for too long: "
                "run the same command again"
            )

    def check_age(self) -> None:
        """Renew where the last renewal is so long ago that the thread may be held up. Raises OutputError."""
        if time.monotonic() - self._renewed_at > seconds() / 2:
            self.check()

    def release(self) -> None:
        """Let go, if it is still held."""
        self._stopped.set()
        self._thread.join()
        with suppress(Exception):  # at worst the next one waits for a lease
            if conditional_write.read(self._path) == self._version:
                self._path.unlink()

    def _taken(self) -> Version:
        while True:
            if conditional_write.create(self._path, self._beat()):
                return self._now()
            found = conditional_write.read(self._path)
            if found is None:
                continue  # released just now
            if self._lives(found):
                raise BusyError(
                    f"{self._subject} is being written by another command: wait for it, or write to another place"
                )
            if conditional_write.replace(self._path, self._beat(), found):
                return self._now()

    def _lives(self, found: Version) -> bool:
        """Whether the file changes within one lease, or is let go of."""
        end = time.monotonic() + seconds()
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds() / 6))
            now = conditional_write.read(self._path)
            if now is None:
                return False
            if now != found:
                return True
        return False

    def _beat(self) -> bytes:
        self._beats += 1
        return json.dumps({"holder": self._holder, "beat": self._beats}).encode()

    def _now(self) -> Version:
        found = conditional_write.read(self._path)
        if found is None or json.loads(found.data)["holder"] != self._holder:
            raise BusyError(f"{self._subject} was taken by another command at the same moment: wait for it")
        return found

    def _renewed(self) -> bool:
        with self._guard:
            if not conditional_write.replace(self._path, self._beat(), self._version):
                return False
            self._version, self._renewed_at = self._now(), time.monotonic()
            return True

    def _keep(self) -> None:
        while not self._stopped.wait(seconds() / 3):
            try:
                if not self._renewed():
                    return
            except OutputError:
                continue  # the store did not answer: the next beat may
