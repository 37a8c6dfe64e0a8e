"""What two engines that did the same must agree on."""

import json
from pathlib import Path
from typing import Any


def contents(folder: Path) -> dict[str, Any]:
    """What a stage wrote, without what may differ: the digests of files, and the manifest but for time and place."""
    document = json.loads((folder / "coldctl.json").read_text())
    document["files"] = {name: digest for name, digest in document["files"].items() if "coldctl.json" not in name}
    return {key: value for key, value in document.items() if key not in ("created", "environment", "manifest_digest")}
