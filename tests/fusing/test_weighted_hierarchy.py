"""Past one machine: what is fused in a tree, and a thousand contributors who come as they like."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Ran
from helpers import tiny

Run = Callable[..., Ran]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_tree_of_fuses_is_exact_for_the_mean(kind: str, tmp_path: Path, coldctl: Run) -> None:
    """Groups fused in float64 and weighted by their sizes give the bytes of fusing all at once."""
    base = tiny.make_base(kind, tmp_path / "base")
    groups = {"north": range(5), "south": range(5, 9), "west": range(9, 12)}
    for group, seeds in groups.items():
        for seed in seeds:
            tiny.perturb(base, tmp_path / "all" / group / f"team-{seed}", seed=seed)
        ran = coldctl(
            "fuse", tmp_path / "all" / group, "--base", base, "--output", tmp_path / "groups" / group, "--dtype", "float64"
        )  # fmt: skip
        assert ran.code == 0, ran.stderr
    sizes = tmp_path / "sizes.toml"
    sizes.write_text("".join(f"{group} = {len(seeds)}\n" for group, seeds in groups.items()))
    flat = coldctl("fuse", *(tmp_path / "all" / group for group in groups), "--base", base, "--output", tmp_path / "flat",
                   "--json")  # fmt: skip
    tree = coldctl("fuse", tmp_path / "groups", "--base", base, "--output", tmp_path / "tree", "--weights", sizes,
                   "--dtype", "float32", "--json")  # fmt: skip
    assert (flat.code, tree.code) == (0, 0), flat.stderr + tree.stderr
    assert tree.json["body_digest"] == flat.json["body_digest"]
    rounded = coldctl("fuse", tmp_path / "groups", "--base", base, "--output", tmp_path / "even", "--json")
    assert rounded.json["body_digest"] != flat.json["body_digest"]  # without the groups' sizes it is another mean


def test_more_contributions_than_open_files(base: Path, tmp_path: Path) -> None:
    """The limit that a shell sets for a start is raised where the system lets us; where not, it is said in words."""
    one = tiny.perturb(base, tmp_path / "all" / "team-000", seed=1)
    for number in range(1, 160):
        shutil.copytree(one, tmp_path / "all" / f"team-{number:03d}")

    def fuse(limits: str, output: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "coldctl", "fuse", "all", "--base", str(base), "--output", output]
        script = f"{limits} && exec {shlex.join(command)}"
        return subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)

    raised = fuse("ulimit -S -n 150", "fused")
    assert raised.returncode == 0, raised.stderr
    refused = fuse("ulimit -n 300", "other")
    assert refused.returncode == 2
    assert "fuse them in groups" in refused.stderr
    assert not (tmp_path / "other").exists()
