"""A run with late contributions, and a byte flipped in a file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Ran, suite_text
from helpers.offers import offer

Run = Callable[..., Ran]


class Trail:
    """A RUN whose iterations are fused and promoted from contributions that the test gives."""

    def __init__(self, folder: Path, base: Path, coldctl: Run) -> None:
        shutil.copytree(base, folder / "base")
        (folder / "suite.toml").write_text(suite_text("base"))
        self.run, self.coldctl = folder / "run", coldctl
        assert coldctl("plan", self.run, "--config", folder / "suite.toml").code == 0
        self.bases = [folder / "base"]  # that of iteration 1, of iteration 2 …

    def iteration(self, number: int) -> Path:
        return self.run / f"iteration-{number:03d}"

    def give(self, number: int, name: str, *, seed: int, base: int | None = None) -> Path:
        """A contribution in the folder of iteration `number`, made on the base of iteration `base`."""
        place = self.iteration(number) / "contributions" / name
        return offer(self.bases[(base or number) - 1], place, seed=seed)

    def fuse(self, number: int, *flags: object) -> Ran:
        folder = self.iteration(number)
        return self.coldctl(
            "fuse", folder / "contributions", "--base", self.run, "--output", folder / "fused", "--json", *flags
        )

    def go_on(self, number: int, *flags: object) -> dict[str, Any]:
        """Fuse and promote an iteration; what the manifest says of each contribution."""
        ran = self.fuse(number, *flags)
        assert ran.code == 0, ran.stderr
        assert self.coldctl("promote", self.run).code == 0
        self.bases.append(self.iteration(number) / "fused")
        return {item["name"]: item for item in ran.json["contributions"]}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
