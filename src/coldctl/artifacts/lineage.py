"""The ancestry of a model, from its own manifest alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldctl.artifacts.manifest import Manifest
from coldctl.common.text import printable

_MOST_NODES = 150  # a larger graph is one that nobody reads, and Mermaid itself ends at 500 edges
_LONGEST = 80  # characters of a name or a reason in a node


@dataclass(frozen=True)
class Generation:
    """One model of the ancestry, with the contributions that were fused into it (or refused)."""

    kind: str
    name: str
    iteration: int | None
    body_digest: str
    contributions: tuple[dict[str, Any], ...]
    trusted_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Carried:
    """A contribution of a certain signer that a model carries, in itself or from an ancestor."""

    contribution: str
    iteration: int | None
    signer: str
    weight: float


def generations(document: Manifest) -> list[Generation]:
    """The generations from the pretrained model to the manifest's own, oldest first."""
    ancestors: list[Mapping[str, Any]] = list(document.get("ancestors", []))
    if not ancestors and "base" in document:  # a contribution names its base only
        ancestors = [{"kind": "base", **document["base"]}]
    return [_generation(entry) for entry in [*ancestors, document]]


def carried(ancestry: Sequence[Generation], name: str, fingerprint: str | None) -> list[Carried]:
    """The contributions with a weight that a key signed, oldest first: by its fingerprint, or where there is none its name.

    A contribution that is a fused model itself counts if it carries one.
    """
    found = []
    for generation in ancestry:
        for item in generation.contributions:
            signers = _signers(item)
            mine = fingerprint in signers if fingerprint is not None else name in signers.values()
            if mine and _is_fused(item):
                known = signers.get(fingerprint or "", name)
                found.append(Carried(str(item.get("name", "?")), generation.iteration, known, float(item["weight"])))
    return found


def known_keys(ancestry: Sequence[Generation]) -> set[str]:
    """The names of all keys that were trusted, or signed something, on the way to a model."""
    records = [item for generation in ancestry for item in generation.contributions]
    return {name for generation in ancestry for name in generation.trusted_keys} | {
        name for item in records for name in _signers(item).values()
    }


def unsigned(ancestry: Sequence[Generation]) -> int:
    """How many contributions a model carries that no known key signed: nobody can say whose they are."""
    return sum(_is_fused(item) and not item.get("signer_key") for part in ancestry for item in part.contributions)


def signers_within(document: Manifest) -> dict[str, str]:
    """Names by fingerprint of all who signed what a model carries, for whoever fuses that model as a contribution."""
    records = [item for generation in generations(document) for item in generation.contributions if _is_fused(item)]
    return {key: name for item in records for key, name in _signers(item).items()}


def _signers(item: Mapping[str, Any]) -> dict[str, str]:
    """Names by fingerprint: who signed a contribution, and who signed what was fused into it."""
    within = item.get("signers_within")
    found = {str(key): str(name) for key, name in within.items()} if isinstance(within, dict) else {}
    if isinstance(item.get("signer_key"), str):
        found[item["signer_key"]] = str(item.get("signer"))
    return found


def _is_fused(item: Mapping[str, Any]) -> bool:
    weight = item.get("weight")
    return item.get("status") == "fused" and isinstance(weight, int | float) and weight > 0


def mermaid(ancestry: Sequence[Generation]) -> str:
    """A Mermaid flowchart: pretrained model, contributions, fused models; dotted, with its reason, what was refused.

    >>> print(mermaid([Generation("pretrained", 'a "b"', None, "", ()), Generation("fused", "one", 1, "", ())]))
    graph TD
        model0["a #34;b#34;<br/>pretrained"]
        model1["one<br/>fused"]
        model0 --> model1
    """
    whole = sum(len(generation.contributions) for generation in ancestry) <= _MOST_NODES
    lines = ["graph TD"]
    for number, generation in enumerate(ancestry):
        lines.append(f'    model{number}["{_text(generation.name)}<br/>{_text(generation.kind)}"]')
        before = f"model{number - 1}"
        if number and not generation.contributions:
            lines.append(f"    {before} --> model{number}")
        elif number and not whole:
            lines.append(f'    {before} -- "{_counted(generation)}" --> model{number}')
        elif number:
            for index, item in enumerate(generation.contributions):
                node = f"contribution{number}x{index}"
                lines.append(f'    {node}(["{_text(_described(item))}"])')
                lines.append(f"    {before} --> {node}")
                if item.get("status") == "rejected":
                    reason = _text(f"refused: {item.get('reason') or 'no reason given'}")
                    lines.append(f'    {node} -. "{reason}" .-> model{number}')
                else:
                    lines.append(f"    {node} --> model{number}")
    return "\n".join(lines)


def _described(item: dict[str, Any]) -> str:
    """A contribution in few words: its name, its dataset where that is called otherwise, its age where it is old."""
    name, dataset = str(item.get("name", "?")), item.get("dataset")
    words = name if dataset in (None, name) else f"{name} on {dataset}"
    words += f", age {item['age']}" if item.get("age") else ""
    return f"{words}, signed by {item['signer']}" if item.get("signer") else words


def _counted(generation: Generation) -> str:
    refused = sum(item.get("status") == "rejected" for item in generation.contributions)
    words = f"{len(generation.contributions) - refused} contributions"
    return f"{words}, {refused} refused" if refused else words


def _text(words: str) -> str:
    """Plain text inside a quoted label: what Mermaid or HTML would read as markup becomes an entity code."""
    clean = printable(words)
    short = clean if len(clean) <= _LONGEST else clean[: _LONGEST - 1] + "…"
    return "".join(
        character if character.isalnum() or character in " -_.,:+…" else f"#{ord(character)};" for character in short
    )


def _generation(entry: Mapping[str, Any]) -> Generation:
    return Generation(
        str(entry.get("kind", "model")),
        str(entry.get("name", "?")),
        entry.get("iteration"),
        str(entry.get("body_digest", "")),
        tuple(item for item in entry.get("contributions", []) if isinstance(item, dict)),
        _trusted(entry.get("config")),
    )


def _trusted(config: Any) -> tuple[str, ...]:
    keys = config.get("trusted_keys") if isinstance(config, dict) else None
    return tuple(map(str, keys)) if isinstance(keys, dict) else ()
