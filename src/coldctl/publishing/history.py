"""How a fused model was made, in the words of its card."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from coldctl.artifacts.manifest import GenerationRecord, Manifest
from coldctl.common.text import code, markdown
from coldctl.config.settings import FuseConfig

# Settings of fuse on the card: with an outer optimizer, and otherwise those that are not the defaults.
_OUTER = ("outer_optimizer", "outer_lr", "outer_momentum")
_ARITHMETIC = ("weights", "max_share", "density", "trim", "byzantine", "position", "common_rows")
_UNFOLDED = 3  # newest iterations, whose tables are not folded


def with_ancestors(document: Manifest) -> list[GenerationRecord]:
    """Return the ancestors of a manifest, oldest first, and the manifest itself as the last."""
    return [*document.get("ancestors", []), document]


def fused_generations(document: Manifest) -> list[GenerationRecord]:
    """Return the generations that were fused from contributions, oldest first."""
    return [generation for generation in with_ancestors(document) if generation.get("contributions")]


def history(document: Manifest) -> str:
    """Return the iterations in Markdown: the method and the contributions with their data, licences, weights and training."""
    parts = []
    fused = fused_generations(document)
    for index, generation in enumerate(fused):
        records: Sequence[Mapping[str, Any]] = generation["contributions"]
        config, environment = _fusing(generation)
        accepted = sum(record.get("status") == "fused" for record in records)
        head = f"Iteration {generation.get('iteration') or index + 1}: {accepted} of {len(records)} contributions, "
        head += f"fused by {_recipe(config)}"
        rows = [
            "| contribution | dataset | examples | licence | weight | training | |",
            "|---|---|--:|---|--:|---|---|",
        ]
        rows += [_row(record) for record in records]
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
    """Return the settings and the versions that a model was fused with; a published one states them under `fused_by`."""
    record = generation if generation.get("kind") == "fused" else generation.get("fused_by", {})
    return record.get("config", {}), record.get("environment", {})


def _recipe(config: Mapping[str, Any]) -> str:
    """Return a fuse in words: method, scale, and the settings that are not the defaults."""
    if not config:
        return "settings that are not stated"
    scale, effective = config.get("scale", "1"), config.get("effective_scale")
    automatic = f" ({effective:.3g})" if isinstance(effective, float) and "auto" in str(scale) else ""
    words = [f"{code(config.get('method', 'mean'))} with λ = {_plain(scale)}{automatic}"]
    if config.get("outer_optimizer", "none") != "none":
        words = [code(config.get("method", "mean")), *(_setting(config, key) for key in _OUTER)]
    changed = (key for key in _ARITHMETIC if config.get(key, getattr(FuseConfig, key)) != getattr(FuseConfig, key))
    return ", ".join([*words, *(_setting(config, key) for key in changed)])


def _as_html(words: str) -> str:
    """Convert a line of our Markdown to HTML: without its code marks and escapes."""
    return html.escape(re.sub(r"\\(.)", r"\1", words).replace("`", ""), quote=False)


def _setting(config: Mapping[str, Any], key: str) -> str:
    return f"{key.replace('_', ' ')}: {_plain(config.get(key))}"


def _plain(value: object) -> str:
    return markdown(str(value))


def _row(record: Mapping[str, Any]) -> str:
    training, environment = record.get("training") or {}, record.get("environment") or {}
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
    refused = record.get("status") == "rejected"
    note = f"refused: {markdown(record.get('reason') or 'no reason given')}" if refused else "fused"
    if record.get("age"):
        note += f", made on the base {record['age']} iteration{'s' if record['age'] > 1 else ''} before, discounted"
    cells = [
        markdown(str(record.get("name", ""))),
        markdown(record.get("dataset") or "not stated"),
        str(record.get("num_train") or "not stated"),
        markdown(record.get("license") or "not stated"),
        f"{record.get('weight', 0.0):.3f}",
        markdown(", ".join(words)) or "not stated",
        note,
    ]
    return f"| {' | '.join(cells)} |"
