"""A real S3 server on loopback, in a process of its own: moto, with nothing of ours in between."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class S3:
    """A running server with one empty bucket."""

    endpoint: str
    bucket: str
    environment: dict[str, str]  # what a process needs to find it

    @property
    def url(self) -> str:
        """The bucket, as `coldctl` takes it."""
        return f"s3://{self.bucket}"

    def client(self) -> Any:
        """The store's own client."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )  # fmt: skip

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects below a prefix, sorted."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def read(self, name: str) -> bytes:
        """An object's bytes."""
        data: bytes = self.client().get_object(Bucket=self.bucket, Key=name)["Body"].read()
        return data


@contextmanager
def serving(bucket: str = "models") -> Iterator[S3]:
    """Start a server on a free port, make the bucket, and stop the server at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(process, port)
        endpoint = f"http://127.0.0.1:{port}"
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        server = S3(endpoint, bucket, environment)
        server.client().create_bucket(Bucket=bucket)
        yield server
    finally:
        process.terminate()
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the S3 server did not start")
