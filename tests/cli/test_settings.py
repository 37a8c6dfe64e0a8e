"""Settings: read from flags and files, checked, recorded; equal values are one identity, however they are written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from coldctl.cli.app import app
from coldctl.config.fields import settings_of
from coldctl.config.loading import as_record, read, resolve
from coldctl.config.settings import SECTIONS, FinetuneConfig, FuseConfig, PublishConfig
from conftest import Ran

Run = Callable[..., Ran]
ROOT = Path(__file__).parents[2]


def test_flag_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[finetune]\nepochs = 3\nbatch_size = 8\n")
    settings = resolve(FinetuneConfig, read(path), {"epochs": 4, "seed": None})
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (4, 8, 5e-5)


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        (("--scale", "1"), ("--scale", "1.0")),
        (("--scale", "1"), ("--scale", "1e0")),
        (("--scale", "1"), ()),
        (("--scale", "1.5*auto"), ("--scale", "1.50*auto")),
        (("--scale", "auto"), ("--scale", "1*auto")),
        (("--max-shard-size", "5GB"), ("--max-shard-size", "5000MB")),
        (("--max-shard-size", "20KB"), ("--max-shard-size", "20000")),
    ],
)
def test_fuse_leaves_alone_what_was_made_with_equal_numbers(
    flags: tuple[str, ...], same: tuple[str, ...], tmp_path: Path, base: Path, contributions: Path, coldctl: Run
) -> None:
    command = ("fuse", contributions, "--base", base, "--output", tmp_path / "fused")
    assert coldctl(*command, *flags).code == 0
    again = coldctl(*command, *same)
    assert again.code == 0, again.stderr
    assert "left alone" in again.stderr


def test_publish_leaves_alone_what_was_made_with_an_equal_size() -> None:
    sizes = [resolve(PublishConfig, read(None), {"max_shard_size": text}) for text in ("0.5GB", "500MB", "500000000")]
    assert len(set(sizes)) == 1


def test_records_are_canonical_and_those_of_the_defaults_stay_as_they_were(tmp_path: Path) -> None:
    record = as_record(FuseConfig())
    assert (record["scale"], record["max_shard_size"]) == ("1", "5GB")
    (tmp_path / "c.toml").write_text("[fuse]\nscale = 2.50\nmax_shard_size = 1_500_000\nouter_momentum = -0.0\n")
    record = as_record(resolve(FuseConfig, read(tmp_path / "c.toml"), {}))
    assert (record["scale"], record["max_shard_size"], str(record["outer_momentum"])) == ("2.5", "1500KB", "0.0")


BOOLEANS = [
    (section, setting.name)
    for section, kind in SECTIONS.items()
    for setting in settings_of(kind).values()
    if setting.type is bool
]
COMMANDS = {"run": "plan"}


@pytest.mark.parametrize(("section", "kind"), SECTIONS.items())
def test_every_setting_is_an_option_with_help_and_default(section: str, kind: type) -> None:
    options = options_of(COMMANDS.get(section, section))
    for setting in settings_of(kind).values():
        option = options[setting.flag.partition("/")[0]]
        assert option.help
        assert "default: " in option.help
        assert option.secondary_opts == ([f"--no-{setting.name.replace('_', '-')}"] if setting.type is bool else [])


def test_every_option_of_every_command_has_a_help_text() -> None:
    commands: Any = typer.main.get_command(app)
    for name, command in commands.commands.items():
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


@pytest.mark.parametrize(("section", "name"), BOOLEANS)
def test_a_boolean_of_a_file_is_overridden_either_way(section: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    for value in (True, False):
        path.write_text(f"[{section}]\n{name} = {str(value).lower()}\n")
        assert getattr(resolve(SECTIONS[section], read(path), {}), name) is value
        assert getattr(resolve(SECTIONS[section], read(path), {name: not value}), name) is not value


def test_fuse_switches_off_what_a_file_switches_on(
    tmp_path: Path, base: Path, contributions: Path, coldctl: Run
) -> None:
    (tmp_path / "c.toml").write_text("[fuse]\ncommon_rows = true\nverify = false\nstrict = true\n")
    command = ("fuse", contributions, "--base", base, "--config", tmp_path / "c.toml", "--json", "--output")
    config = coldctl(*command, tmp_path / "file").json["config"]
    assert (config["common_rows"], config["verify"], config["strict"]) == (True, False, True)
    ran = coldctl(*command, tmp_path / "flags", "--no-common-rows", "--verify", "--no-strict")
    config = ran.json["config"]
    assert (config["common_rows"], config["verify"], config["strict"]) == (False, True, False)


def test_plan_takes_the_base_of_a_flag_before_that_of_the_file(tmp_path: Path, base: Path, coldctl: Run) -> None:
    (tmp_path / "c.toml").write_text('[run]\nbase = "./nowhere"\n')
    ran = coldctl("plan", tmp_path / "run", "--config", tmp_path / "c.toml", "--base", base)
    assert (ran.code, ran.stdout) == (0, "001\n"), ran.stderr
    assert "--config" in coldctl("plan", tmp_path / "run").stderr


def test_the_reference_page_is_current(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/reference.py"), str(tmp_path / "reference.md")]
    subprocess.run(script, check=True)
    assert (tmp_path / "reference.md").read_text() == (ROOT / "docs/reference.md").read_text(), "run `make reference`"


def options_of(command: str) -> dict[str, Any]:
    commands: Any = typer.main.get_command(app)
    return {option: parameter for parameter in commands.commands[command].params for option in parameter.opts}
