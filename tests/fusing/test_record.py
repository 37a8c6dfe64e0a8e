"""What the manifest of a fused model records, and by what a repeated command is recognised."""

import json
from collections.abc import Callable
from pathlib import Path

from coldctl.common.digests import digest_of
from conftest import Ran
from helpers.bodies import digest


def test_identity_covers_the_retired_setting_as_in_older_models(
    tmp_path: Path, base: Path, contributions: Path, coldctl: Callable[..., Ran]
) -> None:
    assert coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "fused").code == 0
    document = json.loads((tmp_path / "fused" / "coldctl.json").read_text())
    settings = {key: value for key, value in document["config"].items() if key != "effective_scale"}
    inputs = {
        "base": digest(base),
        "contributions": [record["body_digest"] for record in document["contributions"]],
        "weights": None,
    }
    older = {"stage": "fuse", "config": {**settings, "leave_one_out": False}, "inputs": inputs}
    assert document["identity"] == digest_of(older)
