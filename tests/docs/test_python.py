"""The code of docs/python.md runs from top to bottom, on tiny models."""

import re
from pathlib import Path
from typing import Any

import pytest

import coldctl
from helpers import tiny

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.make_base("roberta", tmp_path / "roberta-base")
    for seed, name in enumerate(("reviews", "movies")):
        tiny.make_dataset(tmp_path / name, seed=seed)
    roles = {"reviews": "seen", "movies": "unseen"}
    tables = "".join(f'[[dataset]]\nname = "{name}"\npath = "{name}"\nrole = "{roles[name]}"\n' for name in roles)
    (tmp_path / "suite.toml").write_text(tables)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, Any] = {}
    for block in blocks:
        code = block.replace('suite="suite.toml",', 'suite="suite.toml", jobs=1,')
        exec(compile(code, str(PAGE), "exec"), names)
    shown = capsys.readouterr().out
    assert "did you mean 'ties'" in shown
    assert "['reviews']" in shown
    assert names["published"].files["model.safetensors"]
    assert coldctl.fuse("contributions", base="roberta-base", output="fused").unchanged


def test_the_page_names_every_function_and_every_error() -> None:
    text = PAGE.read_text()
    internal = {"__version__", "InputError"}
    assert {name for name in coldctl.__all__ if f"`{name}" not in text and f"coldctl.{name}" not in text} <= internal
