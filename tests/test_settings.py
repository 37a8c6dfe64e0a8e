"""Settings: read from flags and files, checked, recorded; equal values are one identity, however they are written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from coldctl.config.loading import as_record, read, resolve
from coldctl.config.settings import FinetuneConfig, FuseConfig, PublishConfig
from conftest import Ran

Run = Callable[..., Ran]


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
