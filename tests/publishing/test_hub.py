"""Publishing to the Hub through the real command in a process of its own, against a hub that this process serves."""

import json
import os
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import Ran, run_coldctl
from helpers import tiny
from helpers.hub_stand_in import Files, Hub, running_hub

README = b"---\ntags:\n- mine\n---\n\n# A name\n\nWritten by hand.\n"


@pytest.fixture(scope="module")
def models(workshop: Path, base: Path) -> dict[int, Path]:
    """A fused model and the one that was fused on top of it."""
    made: dict[int, Path] = {}
    for number in (1, 2):
        below, made[number] = made.get(number - 1, base), workshop / f"hub-{number}"
        gifts = [tiny.perturb(base, workshop / f"hub-{number}-{seed}", seed=10 * number + seed) for seed in (1, 2)]
        ran = run_coldctl("fuse", *gifts, "--base", below, "--output", made[number])
        assert ran.code == 0, ran.stderr
    return made


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


@dataclass
class Publisher:
    """`python -m coldctl publish` in an environment of its own."""

    hub: Hub
    home: Path

    def __call__(
        self, model: Path, to: str, *options: object, token: str = "hf_writer", terminal: bool = False,
        **environment: str,
    ) -> Ran:  # fmt: skip
        hidden = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS")
        inherited = {key: value for key, value in os.environ.items() if key not in hidden}
        own = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.home / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join([str(self.home), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **({"HF_TOKEN": token} if token else {}),
            **environment,
        }
        command = [sys.executable, "-m", "coldctl", "publish", model, "--to", to, "--license", "mit", *options]
        self.hub.requests.clear()
        words = [str(word) for word in command]
        if not terminal:
            ran = subprocess.run(words, env=inherited | own, capture_output=True, text=True, check=False)
            return Ran(ran.returncode, ran.stdout, ran.stderr)
        ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (24, 120))
        with subprocess.Popen(words, env=inherited | own, stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            drawn = b"".join(iter(lambda: _drawn(ours), b""))
            os.close(ours)
            assert process.stdout is not None
            stdout = process.stdout.read().decode()
        return Ran(process.returncode, stdout, drawn.decode())


def _drawn(terminal: int) -> bytes:
    """What came next on a terminal; nothing once the other side has closed it."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


@pytest.fixture
def publish(hub: Hub, tmp_path: Path) -> Publisher:
    """The library waits seconds between its attempts; here it does not."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n\nsleep = time.sleep\ntime.sleep = lambda _: sleep(0.01)\n"
    )
    return Publisher(hub, tmp_path)


def refused(ran: Ran, *words: str) -> None:
    """The command ended with exit code 2 and one line."""
    assert ran.code == 2, ran.stderr
    errors = [
        line for line in ran.stderr.splitlines() if line and not line.startswith(("loaded as", "licence:", "card:"))
    ]
    assert len(errors) == 1, ran.stderr
    for word in words:
        assert word in errors[0], errors[0]


def written(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_published_in_one_commit_and_again_on_top(
    models: dict[int, Path], hub: Hub, publish: Publisher, tmp_path: Path, coldctl: Callable[..., Ran]
) -> None:
    import torch
    from transformers import AutoModel

    hub.faults["upload", 503] = 1  # the library's own second attempt
    ran = publish(models[1], "hf://me/model", "--max-shard-size", "30KB")
    assert ran.code == 0, ran.stderr
    assert all(line.startswith(("loaded", "licence", hub.endpoint)) for line in ran.stderr.splitlines()), ran.stderr
    repository = hub.repositories["me/model"]
    assert not repository.private
    assert repository.messages == ["hub-1, iteration 1"]
    assert repository.tags == {"iteration-001": repository.refs["main"]}
    first = dict(repository.files)
    shards = [name for name in first if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert 'from_pretrained("me/model")' in first["README.md"].decode()
    folder = written(first, tmp_path / "downloaded")
    ran = coldctl("check", folder, "--deep", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["sound"]
    source, loaded = (AutoModel.from_pretrained(place).state_dict() for place in (models[1], folder))
    assert all(torch.equal(source[name], tensor) for name, tensor in loaded.items() if not name.startswith("pooler."))

    ran = publish(models[1], "hf://me/model", "--max-shard-size", "30KB")
    assert ran.code == 0, ran.stderr
    assert "complete already" in ran.stderr
    assert not hub.writes

    card = first["README.md"].decode() + "\nA paragraph of mine.\n"
    hub.add("me/model", {"README.md": card.encode(), "notes.txt": b"mine", ".gitignore": b"*.safetensors\n"})
    ran = publish(models[2], "hf://me/model")
    assert ran.code == 0, ran.stderr
    assert repository.messages == ["hub-1, iteration 1", "by hand", "hub-2, iteration 2"]
    assert repository.tags["iteration-002"] == repository.refs["main"]
    assert repository.files["notes.txt"] == b"mine"
    assert "A paragraph of mine." in repository.files["README.md"].decode()
    assert [name for name in repository.files if "safetensors" in name] == ["model.safetensors"]
    tagged = repository.at("iteration-001")
    assert tagged is not None
    assert tagged.files == first
    # The hub has byte for byte what the same command writes here.
    ran = coldctl("publish", models[2], "--to", tmp_path / "local", "--license", "mit")
    assert ran.code == 0, ran.stderr
    local = json.loads((tmp_path / "local" / "coldctl.json").read_text())["files"]
    remote = json.loads(repository.files["coldctl.json"])["files"]
    assert {name: local[name] for name in local if name != "README.md"} == {
        name: remote[name] for name in remote if name != "README.md"
    }
    ours = {name: data for name, data in repository.files.items() if name != "notes.txt"}
    ran = coldctl("check", written(ours, tmp_path / "second"), "--deep")
    assert ran.code == 0, ran.stderr

    # Another branch begins with what main holds: what is ours of it and no longer there goes.
    hub.faults["commit", 503] = 1
    before = dict(repository.refs)
    refused(publish(models[1], "hf://me/model@sharded", "--max-shard-size", "30KB"), "the Hub answered 503")
    assert repository.refs == {**before, "sharded": before["main"]}  # the branch stays, and is gone on with
    ran = publish(models[1], "hf://me/model@sharded", "--max-shard-size", "30KB")
    assert ran.code == 0, ran.stderr
    branch = repository.at("sharded")
    assert branch is not None
    assert sorted(name for name in branch.files if name.endswith(".safetensors")) == sorted(shards)
    assert branch.files["notes.txt"] == b"mine"
    assert repository.refs["main"] == before["main"]
    assert repository.at("iteration-001") is tagged


def test_publish_goes_on_with_what_a_broken_call_left(models: dict[int, Path], hub: Hub, publish: Publisher) -> None:
    def attempt(**options: Any) -> Ran:
        return publish(models[1], "hf://me/model", "--private", "--quiet", **options)

    hub.faults["upload"] = 6
    refused(attempt(), "check the connection and run the same command again")
    assert hub.faults["upload"] == 0
    repository = hub.repositories["me/model"]  # made, private and empty
    assert repository.private
    assert not repository.messages

    hub.faults["commit"] = 1
    refused(attempt(), "check the connection and run the same command again")
    assert not any(write.endswith("/create") for write in hub.writes)
    assert not repository.messages

    hub.faults["commit after"] = 1  # it has arrived, but nobody was told
    refused(attempt(), "run the same command again")
    assert hub.repositories == {"me/model": repository}
    assert len(repository.messages) == 1
    assert not repository.tags

    ran = attempt()
    assert ran.code == 0, ran.stderr
    assert not ran.stderr
    assert hub.writes == [f"POST /api/models/me/model/tag/{repository.refs['main']}"]
    assert repository.tags == {"iteration-001": repository.refs["main"]}


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("hf://ORG/bad..name", ("Cannot have -- or ..", "write hf://ORG/NAME")),
        ("hf://name-without-owner", ("names no owner",)),
        ("hf://me/name@", ("hf://ORG/NAME@REVISION",)),
    ],
)
def test_names_that_the_hub_refuses(
    to: str, words: tuple[str, ...], models: dict[int, Path], coldctl: Callable[..., Ran]
) -> None:
    refused(coldctl("publish", models[1], "--to", to, "--license", "mit"), *words)


def test_a_pull_request_changes_main(models: dict[int, Path], coldctl: Callable[..., Ran]) -> None:
    ran = coldctl("publish", models[1], "--to", "hf://me/model@next", "--license", "mit", "--create-pr")
    refused(ran, "--create-pr asks to change main, not next", "leave --create-pr or @next out")


@pytest.mark.parametrize(
    ("token", "exists", "words"),
    [
        ("", False, ("there is no token", "hf auth login", "HF_TOKEN")),
        ("", True, ("there is no token", "hf auth login", "HF_TOKEN")),
        ("hf_wrong", True, ("401", "hf auth login", "HF_TOKEN")),
        ("hf_reader", False, ("take a token that may write to me/model",)),
    ],
)
def test_a_token_that_cannot_write_is_told_before_the_work(
    token: str, exists: bool, words: tuple[str, ...], models: dict[int, Path], hub: Hub, publish: Publisher
) -> None:
    if exists:
        hub.add("me/model", {})
    refused(publish(models[1], "hf://me/model", token=token), *words)
    assert not hub.writes
    assert bool(hub.repositories) == exists


def test_a_hub_that_cannot_be_reached(models: dict[int, Path], hub: Hub, publish: Publisher) -> None:
    ran = publish(models[1], "hf://me/model", HF_ENDPOINT="http://127.0.0.1:9")
    refused(ran, "Connection refused", "check the connection")
    refused(publish(models[1], "hf://me/model", HF_HUB_OFFLINE="1"), "unset it and run the same command again")
    assert not hub.requests


def test_what_others_wrote(models: dict[int, Path], hub: Hub, publish: Publisher) -> None:
    repository = hub.add("them/theirs", {"README.md": README, "pytorch_model.bin": b"weights"})
    refused(publish(models[1], "hf://them/theirs"), "did not write", "--overwrite")
    refused(publish(models[1], "hf://them/theirs", "--private", "--overwrite"), "is public already")
    assert len(repository.commits) == 2

    # Somebody who may not write there says so when the pull request is sent.
    hub.refuse_writes = 403
    ran = publish(models[1], "hf://them/theirs", "--overwrite", "--create-pr", token="hf_fine")
    refused(ran, "the Hub answered 403", "take a token that may write to them/theirs")
    hub.refuse_writes = None
    ran = publish(models[1], "hf://them/theirs", "--overwrite", "--create-pr", "--json", terminal=True)
    assert ran.code == 0, ran.stderr
    assert "model.safetensors: 100%" in ran.stderr
    assert "README.md:" not in ran.stderr  # only what is large has a bar
    assert ran.json["place"] == f"{hub.endpoint}/them/theirs/discussions/1"
    assert not repository.tags
    assert set(repository.files) == {".gitattributes", "README.md", "pytorch_model.bin"}
    proposed = repository.at("refs/pr/1")
    assert proposed is not None
    assert proposed.files["pytorch_model.bin"] == b"weights"
    assert "Written by hand." in proposed.files["README.md"].decode()


def test_a_dry_run_sends_nothing(models: dict[int, Path], hub: Hub, publish: Publisher) -> None:
    ran = publish(models[1], "hf://me/model@try", "--dry-run", "--json")
    assert ran.code == 0, ran.stderr
    assert not [request for request in hub.requests if request.method not in ("GET", "HEAD")]
    assert not hub.repositories
    assert {"model.safetensors", "README.md", "coldctl.json"} <= set(ran.json["sizes"])
    assert "nothing was sent" in ran.stderr
    assert "model.safetensors" in ran.stderr


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch, coldctl: Callable[..., Ran]) -> Callable[..., Ran]:
    """`coldctl publish` in this process, where the library read its environment long ago."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")

    def run(model: Path, *options: object) -> Ran:
        hub.requests.clear()
        return coldctl("publish", model, "--to", "hf://me/model", "--license", "mit", *options)

    return run


@pytest.mark.parametrize(
    ("endpoint", "status", "words"),
    [
        ("get_info", 500, ("cannot read hf://me/model: the Hub answered 500", "run the same command again")),
        ("get_whoami", 401, ("the Hub answered 401", "hf auth login")),
        ("post_create", 409, ("the name is taken by a repository that this token may not see", "another name")),
        ("post_create", 403, ("the Hub answered 403", "take a token that may write to me/model")),
        ("any_yaml", 400, ("Invalid metadata in README.md", "correct the front matter of its README.md")),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    endpoint: str, status: int, words: tuple[str, ...], models: dict[int, Path], hub: Hub, here: Callable[..., Ran]
) -> None:
    hub.faults[endpoint, status] = 1
    refused(here(models[1], "--quiet"), *words)
    assert hub.faults[endpoint, status] == 0
    assert not any(repository.messages for repository in hub.repositories.values())


def test_a_hub_that_is_asked_too_often_for_names_is_written_to(
    models: dict[int, Path], hub: Hub, here: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)  # the user's own word
    hub.faults["get_whoami", 429] = 1
    ran = here(models[1], "--quiet")
    assert ran.code == 0, ran.stderr
    assert hub.faults["get_whoami", 429] == 0
    assert hub.repositories["me/model"].messages == ["hub-1, iteration 1"]


def test_a_tag_follows_its_iteration(base: Path, models: dict[int, Path], hub: Hub, here: Callable[..., Ran]) -> None:
    assert here(models[1]).code == 0
    repository = hub.repositories["me/model"]
    first = repository.refs["main"]
    assert here(models[1], "--max-shard-size", "30KB").code == 0  # the same iteration in other files
    second = repository.refs["main"]
    assert repository.tags == {"iteration-001": second} != {"iteration-001": first}
    # Somebody set it elsewhere by hand: to other files of that iteration, and to a commit that is none of ours.
    for place in (first, repository.commits[0].oid):
        repository.tags["iteration-001"] = place
        ran = here(models[1], "--max-shard-size", "30KB")
        assert ran.code == 0, ran.stderr
        assert "complete already" in ran.stderr
        assert repository.tags == {"iteration-001": second}
    # What is no iteration has no tag.
    repository.tags.clear()
    assert here(base).code == 0
    third = repository.refs["main"]
    assert third != second
    assert "complete already" in here(base).stderr
    assert repository.refs["main"] == third
    assert not repository.tags
    assert not hub.writes


def test_publish_opens_one_pull_request_whatever_breaks(
    models: dict[int, Path], hub: Hub, here: Callable[..., Ran]
) -> None:
    repository = hub.add("me/model", {"README.md": README})
    options = ("--create-pr", "--json")
    hub.faults["commit"] = 1
    refused(here(models[1], *options), "run the same command again")
    assert set(repository.refs) == {"main"}
    hub.faults["commit after"] = 1  # it has arrived, but nobody was told
    refused(here(models[1], *options), "run the same command again")
    ran = here(models[1], *options)
    assert ran.code == 0, ran.stderr
    assert not hub.writes
    assert f"{hub.endpoint}/me/model/discussions/1" in ran.stdout + ran.stderr
    assert set(repository.refs) == {"main", "refs/pr/1"}
    assert here(models[2], *options).code == 0
    assert set(repository.refs) == {"main", "refs/pr/1", "refs/pr/2"}


@pytest.mark.parametrize(("stated", "hidden"), [(True, True), (None, True), (None, False)])
def test_the_librarys_bars_are_as_they_were(stated: bool | None, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, utils

    from coldctl.publishing import hub as target

    bars: Any = utils
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", stated)
    before = bars.are_progress_bars_disabled()
    (bars.disable_progress_bars if hidden else bars.enable_progress_bars)()
    try:
        with target._bars_shown():
            assert bars.are_progress_bars_disabled() is bool(stated)
        assert bars.are_progress_bars_disabled() is hidden
    finally:
        (bars.disable_progress_bars if before else bars.enable_progress_bars)()
