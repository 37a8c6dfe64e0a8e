"""The ancestry of a model, from its own manifest alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldctl.artifacts.manifest import Manifest
from coldctl.common.text import printable

# A larger graph is not readable, and Mermaid itself ends at 500 edges.
_MOST_NODES = 150
_LONGEST = 80  # characters of a name or a reason in a node


@dataclass(frozen=True)
class Generation:
    """One model of the ancestry, with the contributions that were fused into it or rejected."""

    kind: str
    name: str
    iteration: int | None
    body_digest: str
    contributions: tuple[dict[str, Any], ...]
    trusted_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Carried:
    """A contribution of one signer that was fused into a model or one of its ancestors."""

    contribution: str
    iteration: int | None
    signer: str
    weight: float


def generations(document: Manifest) -> list[Generation]:
    """Return the generations from the pretrained model to the manifest's own, oldest first."""
    ancestors: list[Mapping[str, Any]] = list(document.get("ancestors", []))
    if not ancestors and "base" in document:
        ancestors = [{"kind": "base", **document["base"]}]
    return [_generation(entry) for entry in [*ancestors, document]]


def carried(ancestry: Sequence[Generation], name: str, fingerprint: str | None) -> list[Carried]:
    """Return the fused contributions that a key signed, oldest first: by its fingerprint, or by its name without one.

    A contribution that is a fused model itself counts if something that was fused into it is signed by the key.
    """
    signed = []
    for generation in ancestry:
        for record in generation.contributions:
            signers = _signers(record)
            matches = fingerprint in signers if fingerprint is not None else name in signers.values()
            if matches and _is_fused(record):
                signer = signers.get(fingerprint or "", name)
                weight = float(record["weight"])
                signed.append(Carried(str(record.get("name", "?")), generation.iteration, signer, weight))
    return signed


def known_keys(ancestry: Sequence[Generation]) -> set[str]:
    """Return the names of all keys that were trusted, or signed a contribution, in an ancestry."""
    records = [record for generation in ancestry for record in generation.contributions]
    trusted = {name for generation in ancestry for name in generation.trusted_keys}
    return trusted.union(*(_signers(record).values() for record in records))


def unsigned(ancestry: Sequence[Generation]) -> int:
    """Return how many fused contributions no trusted key signed: nothing tells whose they are."""
    records = (record for generation in ancestry for record in generation.contributions)
    return sum(_is_fused(record) and not record.get("signer_key") for record in records)


def signers_within(document: Manifest) -> dict[str, str]:
    """Return the names, by fingerprint, of all who signed a contribution that was fused into a model or its ancestors."""
    records = [record for generation in generations(document) for record in generation.contributions]
    return {key: name for record in records if _is_fused(record) for key, name in _signers(record).items()}


def _signers(record: Mapping[str, Any]) -> dict[str, str]:
    """Return names by fingerprint: who signed a contribution, and who signed what was fused into it."""
    signers = dict(record.get("signers_within") or {})
    if record.get("signer_key"):
        signers[record["signer_key"]] = str(record.get("signer"))
    return signers


def _is_fused(record: Mapping[str, Any]) -> bool:
    return record.get("status") == "fused" and record.get("weight", 0) > 0


def mermaid(ancestry: Sequence[Generation]) -> str:
    """Return a Mermaid flowchart: pretrained model, contributions, fused models; rejected ones dotted, with the reason.

    >>> print(mermaid([Generation("pretrained", 'a "b"', None, "", ()), Generation("fused", "one", 1, "", ())]))
    graph TD
        model0["a #34;b#34;<br/>pretrained"]
        model1["one<br/>fused"]
        model0 --> model1
    """
    draw_contributions = sum(len(generation.contributions) for generation in ancestry) <= _MOST_NODES
    lines = ["graph TD"]
    for number, generation in enumerate(ancestry):
        lines.append(f'    model{number}["{_text(generation.name)}<br/>{_text(generation.kind)}"]')
        before = f"model{number - 1}"
        if number and not generation.contributions:
            lines.append(f"    {before} --> model{number}")
        elif number and not draw_contributions:
            lines.append(f'    {before} -- "{_counted(generation)}" --> model{number}')
        elif number:
            for index, record in enumerate(generation.contributions):
                node = f"contribution{number}x{index}"
                lines.append(f'    {node}(["{_text(_described(record))}"])')
                lines.append(f"    {before} --> {node}")
                if record.get("status") == "rejected":
                    reason = _text(f"refused: {record.get('reason') or 'no reason given'}")
                    lines.append(f'    {node} -. "{reason}" .-> model{number}')
                else:
                    lines.append(f"    {node} --> model{number}")
    return "\n".join(lines)


def _described(record: Mapping[str, Any]) -> str:
    """Return a contribution's name, its dataset if that has another name, its age if it is late, and its signer."""
    name, dataset = str(record.get("name", "?")), record.get("dataset")
    words = name if dataset in (None, name) else f"{name} on {dataset}"
    words += f", age {record['age']}" if record.get("age") else ""
    return f"{words}, signed by {record['signer']}" if record.get("signer") else words


def _counted(generation: Generation) -> str:
    refused = sum(record.get("status") == "rejected" for record in generation.contributions)
    words = f"{len(generation.contributions) - refused} contributions"
    return f"{words}, {refused} refused" if refused else words


def _text(words: str) -> str:
    """Return plain text for a quoted label: characters that Mermaid or HTML reads as markup become entity codes."""
    clean = printable(words)
    short = clean if len(clean) <= _LONGEST else clean[: _LONGEST - 1] + "…"
    return "".join(
        character if character.isalnum() or character in " -_.,:+…" else f"#{ord(character)};" for character in short
    )


def _generation(entry: Mapping[str, Any]) -> Generation:
    keys = entry.get("config", {}).get("trusted_keys")
    return Generation(
        entry["kind"],
        entry["name"],
        entry.get("iteration"),
        entry.get("body_digest", ""),
        tuple(entry.get("contributions", [])),
        tuple(keys) if isinstance(keys, dict) else (),
    )
