"""The description of one setting, and the check of a value against it."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from coldctl.common.errors import ConfigError

_TOO_LARGE = 1 << 63  # for any whole number
_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def about(text: str, *, default: str = "", metavar: str = "") -> Meta:
    """Describe a setting: help text, default in words where the value does not say it, and a name for its value."""
    return Meta(description=text, extra={"default": default, "metavar": metavar})


@dataclass(frozen=True)
class Setting:
    """One field of a settings class."""

    name: str
    type: Any  # without metadata and None
    hint: Any  # as annotated
    default: Any  # dataclasses.MISSING without one
    help: str
    default_words: str
    metavar: str
    range: str  # in words, empty without one
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        """Return the option of the command line, with its negation for a boolean."""
        name = self.name.replace("_", "-")
        return f"--{name}/--no-{name}" if self.type is bool else f"--{name}"

    @property
    def many(self) -> bool:
        """Return True if it takes a list."""
        return typing.get_origin(self.type) is tuple

    @property
    def type_words(self) -> str:
        """Return the type in words: its choices, or the kind of value."""
        if self.choices:
            return f"{'list of ' if self.many else ''}{', '.join(self.choices)}"
        return "text or a list of texts" if typing.get_args(self.type) else _TYPES.get(self.type, "text or a number")

    def check(self, value: Any, where: str) -> Any:
        """Return `value`, as TOML or the command line has it, as the setting's type. Raises ConfigError."""
        is_number = type(value) in (int, float)
        parse = getattr(self.type, "parse", None)
        if is_number and (parse or str in (self.type, *typing.get_args(self.type))):
            value = str(value)  # scale = 2.5 in a file
        elif self.many and isinstance(value, str):
            value = [value]
        place = f"{where}: {self.name} = {value!r}"
        try:
            if parse and isinstance(value, str):
                return parse(value)
            checked = msgspec.convert(value, str if parse else self.hint)
        except msgspec.ValidationError:
            raise ConfigError(f"{place}{self._mismatch(value)}") from None
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from None
        if (isinstance(checked, int) and checked >= _TOO_LARGE) or (isinstance(checked, float) and math.isinf(checked)):
            raise ConfigError(f"{place} is out of range: it must be {self.range}")
        return checked + 0.0 if isinstance(checked, float) else checked  # -0.0 is 0.0

    def _mismatch(self, value: Any) -> str:
        if self.choices:
            return f": choose one of {', '.join(self.choices)}"
        if type(value) in {int: (int,), float: (int, float)}.get(self.type, ()):
            return f" is out of range: it must be {self.range}"
        return f" has the wrong type: it must be {self.type_words}"


@cache
def settings_of(kind: type) -> dict[str, Setting]:
    """Return the settings of a settings class by name, in order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: _setting(field, hints[field.name]) for field in dataclasses.fields(kind)}


def _setting(field: "dataclasses.Field[Any]", hint: Any) -> Setting:
    metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, Meta)]
    described = next(meta for meta in metas if meta.description)
    extra = described.extra or {}
    bare = _bare(hint)
    inner = _bare(typing.get_args(bare)[0]) if typing.get_origin(bare) is tuple else bare
    choices = typing.get_args(inner) if typing.get_origin(inner) is Literal else ()
    return Setting(
        field.name,
        bare,
        hint,
        field.default,
        str(described.description),
        extra["default"] or _words(field.default),
        extra["metavar"] or ("|".join(choices) if len(choices) < 5 else ""),
        _range(metas),
        choices,
    )


def _bare(hint: Any) -> Any:
    """Return a type without its metadata and without None."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else typing.Union[tuple(members)]  # noqa: UP007
    return hint


def _words(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "none, it must be given"
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, float):
        return f"{default:g}".replace("e-0", "e-")
    return ", ".join(default) if isinstance(default, tuple) else str(default)


def _range(metas: list[Meta]) -> str:
    limits = {
        key: getattr(meta, key) for meta in metas for key in ("ge", "gt", "le", "lt") if getattr(meta, key) is not None
    }
    high = f" to {limits['le']}" if "le" in limits else f" to below {limits['lt']}" if "lt" in limits else ""
    if "gt" in limits:
        return f"above {limits['gt']}{high}"
    if "ge" not in limits:
        return ""
    return f"{limits['ge']}{high or ' or more'}"
