"""Shared fixtures: the command line as a function, and tiny real models and datasets made once per session."""

import json
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from helpers import tiny
from helpers.s3_server import S3, serving

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing by threads, and tests run side by side
# A shell's background ignores Ctrl-C, and so would everything that is started there.
signal.signal(signal.SIGINT, signal.default_int_handler)
_caches = tempfile.TemporaryDirectory(prefix="coldctl-")  # nor write to the cache of whoever runs it
os.environ["COLDCTL_CACHE"] = _caches.name


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def run_coldctl(*arguments: object) -> Ran:
    """Run the real entry point in this process, as the console script does."""
    from coldctl.cli.app import app

    result: Result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


_TRACED: dict[str, str] = {}  # what makes the processes that tests start count their lines, too


@pytest.fixture(scope="session", autouse=True)
def untraced_children() -> Iterator[None]:
    """Most commands in processes of their own run lines that others run in this one, and start sooner without coverage."""
    _TRACED.update({name: os.environ.pop(name) for name in list(os.environ) if name.startswith("COVERAGE_")})
    yield
    os.environ.update(_TRACED)


@pytest.fixture
def traced_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test whose other processes reach what no test reaches in this one."""
    for name, value in _TRACED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def coldctl() -> Callable[..., Ran]:
    return run_coldctl


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for what the whole session shares; tests only read it."""
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """One S3 server for the whole session."""
    with serving() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The S3 server with an empty bucket of the test's own, which this process and its children find."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    from s3fs import S3FileSystem  # other environments run tests without it

    S3FileSystem.clear_instance_cache()  # another test's may be connected to elsewhere
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=bucket)
    return replace(s3_server, bucket=bucket)


@pytest.fixture(scope="module")
def cluster(s3_server: S3) -> Iterator[Any]:
    """A cluster of one core, whose nodes find the store; tests add nodes as they need them."""
    from ray.cluster_utils import Cluster

    environment = pytest.MonkeyPatch()
    for name, value in {
        **_TRACED,
        **s3_server.environment,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }.items():
        environment.setenv(name, value)
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    started = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield started
    finally:
        started.shutdown()
        environment.undo()


@pytest.fixture(scope="session")
def base(workshop: Path) -> Path:
    """A tiny bare BERT."""
    return tiny.make_base("bert", workshop / "tiny-bert")


@pytest.fixture(scope="session")
def dataset(workshop: Path) -> Path:
    """A tiny dataset with two classes."""
    return tiny.make_dataset(workshop / "reviews")


@pytest.fixture(scope="session")
def contributions(workshop: Path, base: Path) -> Path:
    """A folder of three real contributions, finetuned from `base` on two seen datasets and one more."""
    folder = workshop / "contributions"
    for seed, name in enumerate(("one", "two", "three")):
        data = tiny.make_dataset(workshop / f"data-{name}", seed=seed)
        ran = run_coldctl("finetune", data, "--base", base, "--output", folder / name, *FAST, "--jobs", 1)
        assert ran.code == 0, ran.stderr
    return folder


@pytest.fixture(scope="session")
def suite(workshop: Path, base: Path) -> Path:
    """A suite of two seen datasets and an unseen one, with settings for tiny models."""
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(workshop / name, seed=10 + seed)
    path = workshop / "suite.toml"
    path.write_text(suite_text(base.name))
    return path


def suite_text(base: str) -> str:
    tables = "".join(
        f'[[dataset]]\nname = "{name}"\npath = "{name}"\nrole = "{role}"\nlicense = "mit"\n'
        for name, role in (("red", "seen"), ("green", "seen"), ("blue", "unseen"))
    )
    return (
        f'[run]\nbase = "./{base}"\n[finetune]\nepochs = 1\nbatch_size = 16\nlearning_rate = 1e-3\n'
        f'[publish]\nlicense = "mit"\n{tables}'
    )


FAST = ("--epochs", 1, "--batch-size", 16, "--learning-rate", 1e-3)
