"""`scale.py plan`: what an iteration costs beyond the machines that it was measured on, from measured constants.

Bytes per contribution are parameters × bytes per parameter of the encoding. One fuser needs, for each contribution and
parameter, the time that `scale.py rates` measures to read, prove, decode and average, and some milliseconds per contribution.
A tree of fuses (groups of k, then the groups, in float64: exact for the mean) needs the time of its slowest group and of the last
fuse; k is the one that makes that least. Network and store are taken to keep up; where they do not, theirs is the rate to give.
Prints Markdown and measures nothing.
"""

import argparse
import math
from dataclasses import dataclass

# Bytes per parameter of float32 bodies, as `scale.py traffic` finds them on the demo's base, and nanoseconds per contribution and
# parameter, as `scale.py rates` finds them.
BYTES = {"full": 4.0, "delta-bf16": 2.0, "delta-int8": 1.01, "lora": 0.085}
NANOSECONDS = {"full": 5.4, "delta-bf16": 9.4, "delta-int8": 11.1, "lora": 8.9}
_WHOLE = 2.0  # a float64 group costs so many times a float32 contribution


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
        "- one fuser spends per contribution and parameter "
        + ", ".join(f"{value:g} ns ({send})" for send, value in NANOSECONDS.items())
        + f", and {options.each:g} ms per contribution",
        "",
        "| contributors × parameters | `--send` | each sends | all send | one fuser | groups of | one fuser per group | fusers |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for case in CASES:
        for send, width in BYTES.items():
            each = width * case.parameters
            pace = NANOSECONDS[send] * case.parameters / 1e9 + options.each / 1e3
            last = _WHOLE * NANOSECONDS["full"] * case.parameters / 1e9 + options.each / 1e3
            whole = case.contributors * pace
            group, seconds = min(
                ((k, k * pace + math.ceil(case.contributors / k) * last) for k in _groups(case.contributors)),
                key=lambda found: found[1],
            )
            fusers = math.ceil(case.contributors / group)
            lines.append(
                f"| {case.name} | {send} | {_bytes(each)} | {_bytes(each * case.contributors)} | {_time(whole)} | {group} | "
                f"{_time(seconds)} | {fusers} |"
            )
    return "\n".join(lines)


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
