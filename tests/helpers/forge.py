"""Forge checkpoints as an attacker would."""

import json
import shutil
from pathlib import Path

from coldctl.common.digests import digest_of


def forge(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a directory whose manifest says something else, with all digests in order."""
    shutil.copytree(source, target)
    document = {**json.loads((target / "coldctl.json").read_text()), **changes}
    document.pop("manifest_digest")
    document["manifest_digest"] = digest_of(document)
    (target / "coldctl.json").write_text(json.dumps(document))
    return target
