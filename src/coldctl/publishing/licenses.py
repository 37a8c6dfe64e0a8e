"""Obligations that the licences of contributions put on the model. A hint, no legal advice."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# By the SPDX identifiers and the Hub's own names, in lower case.
_KINDS = (
    ("non-commercial", re.compile(r"(-nc\b|-nc-|noncommercial|^fair-noncommercial)")),
    ("no-derivatives", re.compile(r"-nd\b")),
    ("share-alike", re.compile(r"^(a|l)?gpl|^cc-by(-nc)?-sa|^(mpl|epl|eupl|osl|odbl|ms-rl|cecill)")),
)
_VAGUE = ("other", "unknown", "proprietary", "openrail", "bigscience-openrail-m", "creativeml-openrail-m")


def warnings(license_: str, contributions: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return one sentence per way in which the licences of fused contributions do not fit the model's `license_`.

    >>> warnings("mit", [{"name": "a", "license": "cc-by-nc-4.0"}, {"name": "b", "license": "MIT"}])
    ['a is under cc-by-nc-4.0, which forbids commercial use; mit allows it']
    """
    names_by_license: dict[str, dict[str, None]] = {}
    for record in contributions:
        if record.get("status", "fused") == "fused":
            names = names_by_license.setdefault((record.get("license") or "").strip().lower(), {})
            names[str(record.get("name", "?"))] = None
    return [
        f"{_listed(list(names))} {words}"
        for license_of_data, names in names_by_license.items()
        for words in _objections(license_of_data, license_.lower(), several=len(names) > 1)
    ]


def _objections(theirs: str, own: str, *, several: bool) -> list[str]:
    are = "are" if several else "is"
    if not theirs:
        return [f"{'do' if several else 'does'} not say under which licence {'they are' if several else 'it is'} given"]
    if theirs in _VAGUE:
        return [f"{are} under {theirs!r}, whose terms have to be read"]
    kinds, ours = _kinds(theirs), _kinds(own)
    objections = []
    if "non-commercial" in kinds and "non-commercial" not in ours:
        objections.append(f"{are} under {theirs}, which forbids commercial use; {own} allows it")
    if "no-derivatives" in kinds:
        objections.append(
            f"{are} under {theirs}, which forbids giving on what is derived from it, and a fused model is"
        )
    if "share-alike" in kinds and own != theirs:
        objections.append(
            f"{are} under {theirs}, which asks that what is derived from it keeps that licence, not {own}"
        )
    return objections


def _kinds(license_: str) -> set[str]:
    return {kind for kind, pattern in _KINDS if pattern.search(license_)}


def _listed(names: list[str]) -> str:
    shown = names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
