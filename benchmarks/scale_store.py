"""`scale.py store`: fusing small contributions from an S3 server on loopback, beside downloading the same objects.

By turns, each a process of its own: all objects of all contributions fetched by the store's own client (boto3), one after
the other and by eight threads, and forgotten; `coldctl fuse` of the same contributions from and into the bucket, with
everything on; once more through a proxy that counts its requests. The server (moto, one Python process) shares
the cores with its clients. Prints Markdown.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fuse import SMALL, make_family, measure, sign

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def store(options: argparse.Namespace) -> str:
    """Make contributions, store them, measure by turns, and say it in Markdown."""
    from helpers.s3_server import serving

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.scratch)))
        server = stack.enter_context(serving("models"))
        os.environ.update(server.environment)
        counts = [str(count) for count in options.contributions]
        # This process stays small, or its children's peak memory would be its own: see fuse.py.
        subprocess.run((sys.executable, __file__, "make", str(scratch), *counts), check=True)
        lines = [
            "| of 4 MB | client, 1 thread, s | 8 threads, s | `coldctl fuse`, s | ratio | peak resident, MB | requests each |",
            "| --: | --: | --: | --: | --: | --: | --: |",
        ]
        lines += [_row(server, count, options.runs) for count in options.contributions]
        return "\n".join(lines)


def _row(server: Any, count: int, runs: int) -> str:
    url = server.url
    found: dict[str, list[float]] = {"1": [], "8": [], "fuse": [], "memory": []}
    for run in range(runs):
        for threads in ("1", "8"):
            command = (sys.executable, __file__, "download", f"{count}/", threads)
            found[threads].append(measure(command).wall)
        sample = measure(
            (sys.executable, "-m", "coldctl", "fuse", f"{url}/{count}", "--base", f"{url}/base", "--quiet",
             "--output", f"{url}/fused-{count}-{run}")
        )  # fmt: skip
        found["fuse"].append(sample.wall)
        found["memory"].append(sample.resident / 1e6)
    middle = {key: statistics.median(values) for key, values in found.items()}
    ratio = middle["fuse"] / min(middle["1"], middle["8"])
    return (
        f"| {count} | {middle['1']:.1f} | {middle['8']:.1f} | {middle['fuse']:.1f} | {ratio:.2f} | "
        f"{middle['memory']:.0f} | {_requests(server, count):.1f} |"
    )


def _requests(server: Any, count: int) -> float:
    """Requests per contribution of a fuse whose answers nothing else waits for, counted by a proxy."""
    from helpers.unreliable import Faults, unreliable

    with unreliable(server.endpoint, Faults()) as (endpoint, counted):
        command = (sys.executable, "-m", "coldctl", "fuse", f"{server.url}/{count}", "--base", f"{server.url}/base",
                   "--quiet", "--output", f"{server.url}/counted-{count}")  # fmt: skip
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        measure(command)
        os.environ["AWS_ENDPOINT_URL"] = server.endpoint
    return counted["answered"] / count


def make(arguments: Sequence[str]) -> None:
    """Write contributions below a folder and put so many of them into the bucket, once for each number."""
    import boto3

    scratch, counts = Path(arguments[0]), [int(count) for count in arguments[1:]]
    make_family(scratch / "base", scratch / "plain", SMALL, max(counts))
    sign(scratch / "base", scratch / "plain", scratch / "signed")
    client = boto3.client("s3")
    _put(client, scratch / "base", "base")
    folders = sorted((scratch / "signed").iterdir())
    for count in counts:
        for folder in folders[:count]:
            _put(client, folder, f"{count}/{folder.name}")


def _put(client: Any, folder: Path, prefix: str) -> None:
    for path in sorted(folder.iterdir()):
        client.put_object(Bucket="models", Key=f"{prefix}/{path.name}", Body=path.read_bytes())


def _listed(client: Any, prefix: str) -> list[dict[str, Any]]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="models", Prefix=prefix)
    return [item for page in pages for item in page.get("Contents", [])]


def download(arguments: Sequence[str]) -> None:
    """Fetch every object below a prefix, in so many threads."""
    import boto3

    client = boto3.client("s3")
    keys = [item["Key"] for item in _listed(client, arguments[0])]
    with ThreadPoolExecutor(int(arguments[1])) as pool:
        for _ in pool.map(lambda key: client.get_object(Bucket="models", Key=key)["Body"].read(), keys):
            pass


if __name__ == "__main__":
    {"make": make, "download": download}[sys.argv[1]](sys.argv[2:])
