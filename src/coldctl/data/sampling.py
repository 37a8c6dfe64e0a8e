"""Seeded draws: stratified, per class, a held-out tenth, a contributor's share.

All functions take labels as `Split.labels` has them and return ascending row indices.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coldctl.data.labels import Labels

_HELD_OUT = 0.1


def stratified(labels: Sequence[int] | Sequence[float] | Labels, count: int, seed: int) -> list[int]:
    """Draw `count` examples, each class in proportion (largest remainders), at least one of each if they fit.

    Numbers that are not classes (floats) and multi-label rows (of 0 and 1) are drawn without strata.
    """
    generator = np.random.default_rng(seed)
    array = np.asarray(labels)
    if count >= len(array):
        return list(range(len(array)))
    if array.ndim == 2 or array.dtype.kind == "f":
        return sorted(generator.permutation(len(array))[:count].tolist())
    members = _members(array)
    sizes = np.array([len(member) for member in members])
    ideal = sizes * (count / len(array))
    shares = np.floor(ideal).astype(int)
    if count >= len(members):
        shares = np.maximum(shares, 1)
    while shares.sum() < count:
        shares[np.argmax(np.where(shares < sizes, ideal - shares, -np.inf))] += 1
    while shares.sum() > count:
        shares[np.argmax(np.where(shares > 1, shares - ideal, -np.inf))] -= 1
    chosen = [generator.permutation(member)[:share] for member, share in zip(members, shares, strict=True)]
    return sorted(np.concatenate(chosen).tolist())


def per_class(labels: Labels, count: int, seed: int) -> list[int]:
    """Draw `count` examples of each class (int64 [n]), all of a class that has fewer."""
    generator = np.random.default_rng(seed)
    return sorted(np.concatenate([generator.permutation(member)[:count] for member in _members(labels)]).tolist())


def held_out(labels: Labels, classes: int, seed: int) -> list[int]:
    """Draw a stratified tenth, and at least one example per class."""
    return stratified(labels, max(classes, round(len(labels) * _HELD_OUT), 1), seed)


def contributor_share(labels: Labels, number: int, contributors: int, seed: int) -> NDArray[np.int64]:
    """Draw the share of contributor `number` (from 1): shares are disjoint, each class is dealt out in turn."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.dtype == np.int64:  # otherwise there are no classes to deal out evenly
        order = order[np.argsort(labels[order], kind="stable")]
    return np.sort(order[number - 1 :: contributors])


def _members(labels: Labels) -> list[NDArray[np.int64]]:
    """Return the ascending indices of each class's examples, one array per class that occurs."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, 1 + np.flatnonzero(np.diff(labels[order])))
