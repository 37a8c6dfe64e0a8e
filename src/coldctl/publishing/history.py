"""How a fused model was made, in the words of its card: what was fused how, and what the contributions were."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from coldctl.artifacts.manifest import Manifest
from coldctl.common.text import code, markdown
from coldctl.config.settings import FuseConfig

# Settings of a fuse that its card tells: of an outer step, and where they are not the defaults.
_OUTER = ("outer_optimizer", "outer_lr", "outer_momentum")
_ARITHMETIC = ("weights", "max_share", "density", "trim", "byzantine", "position", "common_rows")
_UNFOLDED = 3  # iterations whose contributions are shown without a click


def with_ancestors(document: Manifest) -> list[dict[str, Any]]:
    """The manifests that a manifest holds, oldest first, itself the last."""
    return [*document.get("ancestors", []), dict(document)]


def fused_generations(document: Manifest) -> list[dict[str, Any]]:
    """Those of its manifests whose models were fused from contributions, oldest first."""
    return [generation for generation in with_ancestors(document) if generation.get("contributions")]


def history(document: Manifest) -> str:
    """The iterations: what was fused how, and the contributions with their data, licences, weights and training."""
    parts = []
    fused = fused_generations(document)
    for index, generation in enumerate(fused):
        records: Sequence[Mapping[str, Any]] = generation["contributions"]
        config, environment = _fusing(generation)
        accepted = sum(item.get("status") == "fused" for item in records)
        head = f"Iteration {generation.get('iteration') or index + 1}: {accepted} of {len(records)} contributions, "
        head += f"fused by {_recipe(config)}"
        rows = [
            "| contribution | dataset | examples | licence | weight | training | |",
            "|---|---|--:|---|--:|---|---|",
        ]
        rows += [_row(item) for item in records]
        table = "\n".join(rows)
        if index < len(fused) - _UNFOLDED:
            parts.append(f"<details><summary>{_as_html(head)}</summary>\n\n{table}\n\n</details>")
        else:
            parts.append(f"{head}.\n\n{table}")
    if fused and environment:
        versions = ", ".join(f"{key} {value}" for key, value in environment.items() if isinstance(value, str))
        parts.append(f"Fused with {markdown(versions)}.")
    return "\n\n".join(parts) or "It was not fused: there are no iterations to tell of."


def _fusing(generation: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The settings and the versions that a model was fused with; those of a published one are of its publication."""
    told = generation if generation.get("kind") == "fused" else generation.get("fused_by", {})
    return told.get("config", {}), told.get("environment", {})


def _recipe(config: Mapping[str, Any]) -> str:
    """A fuse in words: method, length of the step, and the settings of its arithmetic that are not the defaults."""
    if not config:
        return "settings that are not stated"
    scale, effective = config.get("scale", "1"), config.get("effective_scale")
    told = f" ({effective:.3g})" if isinstance(effective, float) and "auto" in str(scale) else ""
    words = [f"{code(config.get('method', 'mean'))} with λ = {_plain(scale)}{told}"]
    if config.get("outer_optimizer", "none") != "none":
        words = [code(config.get("method", "mean")), *(_told(config, key) for key in _OUTER)]
    changed = (key for key in _ARITHMETIC if config.get(key, getattr(FuseConfig, key)) != getattr(FuseConfig, key))
    return ", ".join([*words, *(_told(config, key) for key in changed)])


def _as_html(words: str) -> str:
    """A line of ours where HTML is read and Markdown is not: without its code marks and escapes."""
    return html.escape(re.sub(r"\\(.)", r"\1", words).replace("`", ""), quote=False)


def _told(config: Mapping[str, Any], key: str) -> str:
    return f"{key.replace('_', ' ')}: {_plain(config.get(key))}"


def _plain(value: object) -> str:
    return markdown(str(value))


def _row(item: Mapping[str, Any]) -> str:
    training, environment = item.get("training") or {}, item.get("environment") or {}
    words = [
        form.format(training[key])
        for key, form in (
            ("epochs", "epochs: {}"), ("batch_size", "batch: {}"), ("learning_rate", "learning rate: {:g}"),
            ("lora_rank", "LoRA rank: {}"),
        )
        if isinstance(training.get(key), int | float) and training[key]
    ]  # fmt: skip
    seconds, threads = environment.get("training_seconds"), environment.get("threads")
    if isinstance(seconds, int | float):
        words.append(
            f"{seconds:.0f} s on {environment.get('device', '?')}" + (f", threads: {threads}" if threads else "")
        )
    refused = item.get("status") == "rejected"
    note = f"refused: {markdown(item.get('reason') or 'no reason given')}" if refused else "fused"
    if item.get("age"):
        note += f", made on the base {item['age']} iteration{'s' if item['age'] > 1 else ''} before, discounted"
    cells = [
        markdown(str(item.get("name", ""))),
        markdown(item.get("dataset") or "not stated"),
        str(item.get("num_train") or "not stated"),
        markdown(item.get("license") or "not stated"),
        f"{item.get('weight', 0.0):.3f}",
        markdown(", ".join(words)) or "not stated",
        note,
    ]
    return f"| {' | '.join(cells)} |"
