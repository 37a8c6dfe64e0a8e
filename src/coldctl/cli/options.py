"""Options made from the settings classes, and groups of options that commands share."""

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from coldctl.config.fields import Setting, settings_of
from coldctl.config.settings import SECTIONS

Flags = Mapping[str, Any]  # settings by name, as flags gave them
Revision = Annotated[
    str | None, typer.Option("--revision", help="Revision of a Hub model: branch, tag or commit. [dim]default: main[/]")
]
_COMMON = "Common options"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` as typer reads it, with one parameter per option.

    A parameter `Annotated[Flags, CLASS, *NAMES]` becomes one option per setting of a settings class, or per setting
    named; the command receives those that were given. `seed` is left out: it is a common option. A parameter whose type
    is a dataclass becomes one option per field, those named in its `Annotated` hidden; the command receives an instance.
    """
    parameters: list[Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        bare, *metadata = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if bare == Flags:
            options = _settings(*metadata)
            groups[name] = (_given, [option.name for option in options])
        elif dataclasses.is_dataclass(bare):
            options = _fields(bare, hidden=metadata)
            groups[name] = (bare, [option.name for option in options])  # type: ignore[assignment]
        else:
            options = [parameter.replace(annotation=hint, kind=Parameter.KEYWORD_ONLY)]
        parameters += options

    def run(**values: Any) -> None:
        made = {name: make(**{key: values.pop(key) for key in keys}) for name, (make, keys) in groups.items()}
        command(**values, **made)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _given(**values: Any) -> Flags:
    return {name: value for name, value in values.items() if value is not None and value != []}


def _settings(kind: type, *names: str) -> list[Parameter]:
    section = next((name for name, settings in SECTIONS.items() if settings is kind), "dataset")
    panel = f"Settings, in a file under {section}"
    settings = settings_of(kind).values()
    return [_option(one, panel) for one in settings if one.name in names or (not names and one.name != "seed")]


def _option(setting: Setting, panel: str) -> Parameter:
    kind = list[str] if setting.many else setting.type if setting.type in (bool, int, float) else str
    words = setting.help
    if setting.choices and setting.metavar != "|".join(setting.choices):
        words += f" One of {', '.join(setting.choices)}."
    words += f" [dim]{setting.range}{'; ' if setting.range else ''}default: {setting.default_words}[/]"
    option = typer.Option(setting.flag, metavar=setting.metavar or None, help=words, rich_help_panel=panel)
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _fields(group: Any, hidden: list[str]) -> list[Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    options = []
    for field in dataclasses.fields(group):
        kind, option = typing.get_args(hints[field.name])
        if field.name in hidden:
            option = copy.copy(option)
            option.hidden = True
        default = Parameter.empty if field.default is dataclasses.MISSING else field.default
        options.append(
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        )
    return options


@dataclass(frozen=True)
class Common:
    """Options that every command accepts, so that a script can pass one set of flags to all of them.

    A command hides those that mean nothing to it.
    """

    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE.toml", help="Settings file (TOML); flags win over it.", rich_help_panel=_COMMON
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Random seed of everything that is drawn. [dim]0 or more; default: 0[/]",
            rich_help_panel=_COMMON,
        ),
    ] = None
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            min=0,
            show_default=False,
            help="Jobs: pieces of work side by side. [dim]default: 0, as many as there are cores[/]",
            rich_help_panel=_COMMON,
        ),
    ] = 0
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            show_default=False,
            help="Engine: where jobs run. [dim]default: local[/]",
            rich_help_panel=_COMMON,
        ),
    ] = "local"
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON: one document on stdout, nothing else there.", rich_help_panel=_COMMON)
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Quiet: no progress and no prose, only errors.", rich_help_panel=_COMMON)
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Overwrite an output that was made from something else.", rich_help_panel=_COMMON
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the Python API: all but what only the screen needs, and the seed, a setting."""
        return {name: value for name, value in vars(self).items() if name not in ("as_json", "quiet", "seed")}


@dataclass(frozen=True)
class Distributed(Common):
    """Options of commands whose work can run on a cluster."""

    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help="Ray cluster's address; auto: this machine's. [dim]default: $RAY_ADDRESS, else one is started[/]",
            rich_help_panel=_COMMON,
        ),
    ] = None


@dataclass(frozen=True)
class Workers(Distributed):
    """Options of commands whose jobs compute with several threads."""

    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            help="Threads of the CPU per job. [dim]1 or more; default: the job's share of the cores[/]",
            rich_help_panel=_COMMON,
        ),
    ] = None


@dataclass(frozen=True)
class Base:
    """The model that contributions start from."""

    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="Base model: directory, Hub id, URL or RUN.")]
    revision: Revision = None
