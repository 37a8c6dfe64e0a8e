"""`scale.py plan`: what an iteration costs beyond the machines that it was measured on, from measured constants.

Bytes per contribution are parameters × bytes per parameter of the encoding. One fuser needs the time of reading all of
them at the rate that it was measured to read, prove and average at, and that of the requests or openings, one after the other.
A tree of fuses (groups of k, then the groups, in float64: exact for the mean) needs the time of its slowest group and of the last
fuse; k is the one that makes that least. Network and store are taken to keep up; where they do not, theirs is the rate to give.
Prints Markdown and measures nothing.
"""

import argparse
import math
from dataclasses import dataclass

# Bytes per parameter of float32 bodies, as `scale.py traffic` finds them on the demo's base.
BYTES = {"full": 4.0, "delta-bf16": 2.0, "delta-int8": 1.02, "lora": 0.12}
_WIDE = 8.0  # bytes per parameter of a group that is fused in float64


@dataclass(frozen=True)
class Case:
    """So many contributors of models of so many parameters."""

    name: str
    contributors: int
    parameters: float


CASES = (
    Case("100 × 125 M", 100, 125e6),
    Case("10,000 × 355 M", 10_000, 355e6),
    Case("100 × 70 B", 100, 70e9),
)


def plan(options: argparse.Namespace) -> str:
    """One row per case and encoding."""
    lines = [
        f"- one fuser reads, proves and averages {options.rate:g} GB/s and spends {options.each:g} ms per contribution",
        "",
        "| contributors × parameters | `--send` | each sends | all send | one fuser | groups of | one fuser per group | fusers |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for case in CASES:
        for send, width in BYTES.items():
            each = width * case.parameters
            whole = _seconds(case.contributors, each, options)
            group, seconds = min(
                ((k, _tree(case, each, k, options)) for k in _groups(case.contributors)), key=lambda x: x[1]
            )
            fusers = math.ceil(case.contributors / group)
            lines.append(
                f"| {case.name} | {send} | {_bytes(each)} | {_bytes(each * case.contributors)} | {_time(whole)} | {group} | "
                f"{_time(seconds)} | {fusers} |"
            )
    return "\n".join(lines)


def _seconds(count: float, size: float, options: argparse.Namespace) -> float:
    return count * (size / (options.rate * 1e9) + options.each / 1e3)


def _tree(case: Case, size: float, group: int, options: argparse.Namespace) -> float:
    last = _seconds(math.ceil(case.contributors / group), _WIDE * case.parameters, options)
    return _seconds(group, size, options) + last


def _groups(contributors: int) -> list[int]:
    return sorted({max(2, round(contributors ** (step / 40))) for step in range(4, 40)})


def _bytes(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _time(seconds: float) -> str:
    for unit, factor in (("h", 3600.0), ("min", 60.0)):
        if seconds >= factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds:,.1f} s"
