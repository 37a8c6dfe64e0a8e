"""Model configs of what we write: what a bare body's `config.json` says, and what none of ours may say."""

import re
from collections.abc import Mapping
from typing import Any

from coldctl.checkpoints.sanitize import CODE, UNUSED

# About a head, about custom code or other files, or about the machine that the model came from.
_DROPPED = (
    *CODE,
    *UNUSED,
    "_name_or_path",
    "torch_dtype",
    "name_or_path",
)


def bare_architecture(architectures: object) -> str | None:
    """The bare model's class name from that of any of its head classes.

    >>> bare_architecture(["XLMRobertaForMaskedLM"])
    'XLMRobertaModel'
    >>> bare_architecture(["BertModel"])
    'BertModel'
    """
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        return None
    name = re.sub(r"(For|With)[A-Z]\w*$", "", architectures[0])
    return name if name.endswith("Model") else f"{name}Model"


def bare_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The `config.json` of a body alone, from that of the checkpoint it came from."""
    bare = {key: value for key, value in config.items() if key not in _DROPPED}
    if name := bare_architecture(config.get("architectures")):
        bare["architectures"] = [name]
    if dtype:
        bare["dtype"] = dtype
    return bare
