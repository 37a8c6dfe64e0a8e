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
    """One sentence per way in which fused contributions' licences do not go with the model's `license_`.

    >>> warnings("mit", [{"name": "a", "license": "cc-by-nc-4.0"}, {"name": "b", "license": "MIT"}])
    ['a is under cc-by-nc-4.0, which forbids commercial use; mit allows it']
    """
    fused = [item for item in contributions if item.get("status", "fused") == "fused"]
    by_license: dict[str, list[str]] = {}
    for item in fused:
        by_license.setdefault((item.get("license") or "").strip().lower(), []).append(str(item.get("name", "?")))
    sentences = []
    for found, names in by_license.items():
        sentences += [f"{_listed(names)} {words}" for words in _objections(found, license_.lower(), len(names) > 1)]
    return sentences


def _objections(found: str, own: str, several: bool) -> list[str]:
    are = "are" if several else "is"
    if not found:
        return [f"{'do' if several else 'does'} not say under which licence {'they are' if several else 'it is'} given"]
    if found in _VAGUE:
        return [f"{are} under {found!r}, whose terms have to be read"]
    kinds, ours = _kinds(found), _kinds(own)
    objections = []
    if "non-commercial" in kinds and "non-commercial" not in ours:
        objections.append(f"{are} under {found}, which forbids commercial use; {own} allows it")
    if "no-derivatives" in kinds:
        objections.append(f"{are} under {found}, which forbids giving on what is derived from it, and a fused model is")
    if "share-alike" in kinds and own != found:
        objections.append(f"{are} under {found}, which asks that what is derived from it keeps that licence, not {own}")
    return objections


def _kinds(license_: str) -> set[str]:
    return {kind for kind, pattern in _KINDS if pattern.search(license_)}


def _listed(names: list[str]) -> str:
    distinct = list(dict.fromkeys(names))
    shown = distinct if len(distinct) <= 6 else [*distinct[:5], f"{len(distinct) - 5} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
