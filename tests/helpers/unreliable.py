"""A proxy before an HTTP server that refuses, drops, cuts short or delays some of the requests, drawn by seed."""

import http.client
import random
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Faults:
    """Which share of the requests meets which fault."""

    refuse: float = 0.0  # 503, as a store that is asked too often
    drop: float = 0.0  # the connection is closed before an answer
    short: float = 0.0  # half of the answer's body comes, then the connection is closed
    slow: float = 0.0  # the answer takes a while
    refuse_writes: float = 0.0  # 403
    seed: int = 0


@contextmanager
def unreliable(endpoint: str, faults: Faults) -> Iterator[tuple[str, Counter[str]]]:
    """Serve on a free port what `endpoint` serves; also counts faults and methods by name."""
    host = urllib.parse.urlsplit(endpoint).netloc
    counted: Counter[str] = Counter()
    drawn = random.Random(faults.seed)
    guard = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with guard:
                dice = drawn.random()
                fault = _fault(faults, dice, self.command)
                counted.update([fault or "answered", self.command])
            if fault in ("refuse", "refuse_writes"):
                code = "SlowDown" if fault == "refuse" else "AccessDenied"
                text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                self.reply(503 if fault == "refuse" else 403, [("Content-Type", "application/xml")], text, len(text))
                return
            if fault == "drop":
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(0.1)
            connection = http.client.HTTPConnection(host)
            connection.request(self.command, self.path, body, dict(self.headers))
            found = connection.getresponse()
            data = found.read()
            headers = [(k, v) for k, v in found.getheaders() if k.lower() not in ("content-length", "connection")]
            length = int(found.getheader("Content-Length") or len(data)) if self.command == "HEAD" else len(data)
            if fault == "short" and len(data) > 1:
                data = data[: len(data) // 2]
                self.close_connection = True
            self.reply(found.status, headers, data, length)
            connection.close()

        def reply(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
            self.send_response_only(status)
            for key, value in headers:
                self.send_header(key, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", counted
    finally:
        server.shutdown()
        server.server_close()


def _fault(faults: Faults, dice: float, method: str) -> str:
    if method in ("PUT", "POST", "DELETE") and dice < faults.refuse_writes:
        return "refuse_writes"
    for name in ("refuse", "drop", "short", "slow"):
        share = getattr(faults, name)
        if dice < share:
            return name
        dice -= share
    return ""
