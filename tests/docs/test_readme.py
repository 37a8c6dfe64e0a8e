"""The README's stage commands run as printed, on the demo's own assets where they are made, else on tiny ones."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Ran
from helpers import tiny

ROOT = Path(__file__).parents[2]


def test_the_readme_commands_run(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Callable[..., Ran]
) -> None:
    text = (ROOT / "README.md").read_text()
    section = text.split("## The stages")[1].split("## Your own model")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines()]
    assert len(lines) == 7
    shutil.copytree(base, tmp_path / "assets/demo/base")
    for seed, name in enumerate(("amazon", "movies", "tweets", "nyt")):
        tiny.make_dataset(
            tmp_path / "assets/demo" / name, labels=("negative", "neutral", "positive"), seed=seed, train=240
        )
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    assert coldctl("plan", "runs/demo", "--config", "configs/demo.toml").code == 0
    for line in lines:
        program, *arguments = line.split()
        assert program == "coldctl"
        jobs = ["--jobs", "1"] if arguments[0] == "evaluate" else []
        ran = coldctl(*arguments, *jobs)
        assert ran.code == 0, (line, ran.stderr)


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), (document.name, link)
