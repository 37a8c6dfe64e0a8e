"""Leases: hold a place in a store, so that two commands do not do the same work.

The holder renews a small file every few seconds. A command that finds the file watches it for one lease. If it changes, the
holder is alive. If not, the command takes the file over by a conditional write. Clocks of two machines are never compared.
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
    """Return how long a holder may be silent before it counts as dead: `$COLDCTL_LEASE_SECONDS`, else 30."""
    try:
        return max(0.1, float(os.environ.get("COLDCTL_LEASE_SECONDS", _SECONDS)))
    except ValueError:
        return _SECONDS


class Lease:
    """A lease on `path`, renewed by a thread until it is released."""

    def __init__(self, path: Location, subject: str) -> None:
        """Take `path`; messages call it `subject`. Raises BusyError if a living command holds it."""
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
        """Renew if the last renewal is so long ago that the thread may be held up. Raises OutputError."""
        if time.monotonic() - self._renewed_at > seconds() / 2:
            self.check()

    def release(self) -> None:
        """Remove the lease, if it is still held."""
        self._stopped.set()
        self._thread.join()
        with suppress(Exception):  # at worst the next one waits for a lease
            if conditional_write.read(self._path) == self._version:
                self._path.unlink()

    def _taken(self) -> Version:
        while True:
            if conditional_write.create(self._path, self._beat()):
                return self._now()
            other = conditional_write.read(self._path)
            if other is None:
                continue  # released just now
            if self._is_renewed(other):
                raise BusyError(
                    f"{self._subject} is being written by another command: wait for it, or write to another place"
                )
            if conditional_write.replace(self._path, self._beat(), other):
                return self._now()

    def _is_renewed(self, seen: Version) -> bool:
        """Watch the file for one lease. Return True if it changes, False if it does not or is removed."""
        end = time.monotonic() + seconds()
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds() / 6))
            now = conditional_write.read(self._path)
            if now is None:
                return False
            if now != seen:
                return True
        return False

    def _beat(self) -> bytes:
        self._beats += 1
        return json.dumps({"holder": self._holder, "beat": self._beats}).encode()

    def _now(self) -> Version:
        current = conditional_write.read(self._path)
        if current is None or json.loads(current.data)["holder"] != self._holder:
            raise BusyError(f"{self._subject} was taken by another command at the same moment: wait for it")
        return current

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
