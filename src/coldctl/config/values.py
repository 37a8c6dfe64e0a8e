"""Numbers that people write as text: steps, sizes, times."""

import math
import re
from dataclasses import dataclass

from coldctl.common.errors import ConfigError

_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}


@dataclass(frozen=True)
class Scale:
    """The length λ of a fuse's step: a number, or a multiple of the automatic length."""

    value: float = 1.0
    automatic: bool = False

    @classmethod
    def parse(cls, text: str) -> "Scale":
        """Read `2`, `auto` or `1.5*auto`. Raises ValueError.

        >>> Scale.parse("1e0") == Scale.parse("1"), Scale.parse("1.50*auto")
        (True, Scale(value=1.5, automatic=True))
        """
        factor, _, word = text.rpartition("*")
        automatic = word == "auto"
        number = (factor if "*" in text else "1") if automatic else text
        try:
            value = float(number) if re.fullmatch(r"[0-9.eE+-]+", number) else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError("give a number, auto, or a multiple such as 1.5*auto")
        return cls(value + 0.0, automatic)  # -0.0 is 0.0

    def __str__(self) -> str:
        """Return the one text that manifests store for this value."""
        number = repr(self.value).removesuffix(".0")
        if not self.automatic:
            return number
        return "auto" if self.value == 1 else f"{number}*auto"


class Size(int):
    """A number of bytes."""

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Read `5GB`, `200MB` or `1000`, with decimal units as transformers counts them. Raises ValueError.

        >>> Size.parse("5000MB") == Size.parse("5GB"), str(Size.parse("5000MB"))
        (True, '5GB')
        """
        unit = text[-2:].upper()
        try:
            size = round(float(text[:-2]) * _UNITS[unit]) if unit in _UNITS else int(float(text))
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            raise ValueError("it is not a size; use for example 5GB or 200MB")
        return cls(size)

    def __str__(self) -> str:
        """Return the one text that manifests store for this value: a whole number of the largest unit that fits."""
        unit, size = next(((unit, size) for unit, size in _UNITS.items() if self % size == 0), ("", 1))
        return f"{int(self) // size}{unit}"


def seconds_in(text: str) -> float:
    """Return `"30s"`, `"10m"`, `"2h"`, `"1d"` in seconds. Raises ConfigError.

    >>> seconds_in("10m")
    600.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"{text!r} is no length of time: write for example 30s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
