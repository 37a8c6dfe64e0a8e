"""Keyword arguments made from the settings classes, and groups that functions share."""

import dataclasses
import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from coldctl.common.progress import SILENT, Progress
from coldctl.config.fields import Setting, about, settings_of
from coldctl.config.loading import refuse_unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldctl.artifacts.model_ref import Model
    from coldctl.workers.jobs import Engine

Result = TypeVar("Result")
Settings = Mapping[str, Any]  # settings by name, as the caller gave them
Place = str | os.PathLike[str]  # a directory, a URL, a Hub id: whatever the command line takes


def with_keywords(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return `function` with one keyword argument per setting and per field of a group, listed in its signature and help.

    A parameter `Annotated[Settings, CLASS, *NAMES]` becomes one keyword per setting of a settings class, or per setting
    named; the function receives those that were given. A parameter whose type is a dataclass becomes one keyword per
    field; the function receives an instance. A keyword that does not exist raises ConfigError.
    """
    parameters: list[Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    described: list[Setting] = []
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        bare, *metadata = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if bare == Settings:
            chosen = [one for one in settings_of(metadata[0]).values() if not metadata[1:] or one.name in metadata[1:]]
            groups[name] = (_given, [one.name for one in chosen])
            parameters += [_optional(one) for one in chosen]
        elif name != "return" and dataclasses.is_dataclass(bare):
            chosen = list(settings_of(bare).values())  # type: ignore[arg-type]
            groups[name] = (bare, [one.name for one in chosen])  # type: ignore[assignment]
            parameters += [_field(one) for one in chosen]
        else:
            if name != "return":
                parameters.append(inspect.signature(function).parameters[name].replace(annotation=hint))
            continue
        described += chosen
    signature = inspect.Signature(
        sorted(parameters, key=lambda one: (one.kind, one.default is not Parameter.empty)),
        return_annotation=typing.get_type_hints(function)["return"],
    )

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Result:
        refuse_unknown(keywords, signature.parameters, f"{function.__name__}()")
        values = dict(signature.bind(*arguments, **keywords).arguments)
        made = {
            name: make(**{key: values.pop(key) for key in keys if key in values})
            for name, (make, keys) in groups.items()
        }
        return function(**values, **made)

    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__doc__ = f"{inspect.getdoc(function)}\n\nKeyword arguments:\n{''.join(map(_line, described))}"
    return run


def _given(**values: Any) -> Settings:
    return {
        name: str(value) if isinstance(value, os.PathLike) else value
        for name, value in values.items()
        if value is not None
    }


def _optional(setting: Setting) -> Parameter:
    """Return the keyword of a setting: None leaves it to the file and the default."""
    kind: Any = str | float if hasattr(setting.type, "parse") else setting.type
    if setting.many:
        inner: Any = typing.get_args(setting.type)[0]
        kind = inner | Sequence[inner]
    elif str in typing.get_args(setting.type):  # a text or several
        kind = str | Sequence[str]
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=None, annotation=kind | None)


def _field(setting: Setting) -> Parameter:
    default = Parameter.empty if setting.default is dataclasses.MISSING else setting.default
    annotation = typing.get_args(setting.hint)[0]
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _line(setting: Setting) -> str:
    choices = f" One of {', '.join(setting.choices)}." if setting.choices else ""
    limits = f"{setting.range}; " if setting.range else ""
    default = "required" if setting.default is dataclasses.MISSING else f"default: {setting.default_words}"
    return f"    {setting.name}: {setting.help}{choices} ({limits}{default})\n"


@dataclass(frozen=True)
class Quiet:
    """The argument of every function that takes long."""

    progress: Annotated[bool | Progress, about("Progress bar in a terminal or a notebook; False: silent.")] = True

    @contextmanager
    def listener(self) -> "Iterator[Progress]":
        """Yield what the command tells its progress to."""
        if self.progress is not True:
            yield self.progress or SILENT
            return
        from coldctl.api.bars import bars, stderr_console

        with bars(stderr_console()) as drawn:
            yield drawn


@dataclass(frozen=True)
class Common(Quiet):
    """Arguments of every function that writes."""

    config: Annotated[Place | None, about("Settings file (TOML); arguments win over it.", default="none")] = None
    overwrite: Annotated[bool, about("Overwrite an output that was made from something else.")] = False

    @property
    def file(self) -> Path | None:
        """Return the settings file's path."""
        return None if self.config is None else Path(self.config)


@dataclass(frozen=True)
class Distributed(Common):
    """Arguments of functions whose work can run on a cluster."""

    jobs: Annotated[int, about("Jobs side by side.", default="0, as many as there are cores")] = 0
    engine: Annotated[str, about("Engine: where jobs run, local or ray.")] = "local"
    ray_address: Annotated[
        str | None, about("Ray cluster's address; auto: this machine's.", default="$RAY_ADDRESS, else one is started")
    ] = None

    def workers(self, *, threads: int | None = None, jobs: int | None = None) -> "Engine":
        """Return the engine that was asked for. Raises ConfigError."""
        from coldctl.workers import choose

        jobs = self.jobs if jobs is None else jobs
        return choose(self.engine, jobs=jobs, threads=threads, ray_address=self.ray_address)


@dataclass(frozen=True)
class Workers(Distributed):
    """Arguments of functions whose jobs compute with several threads."""

    threads: Annotated[int | None, about("CPU threads per job.", default="the job's share of the cores")] = None


@dataclass(frozen=True)
class Base:
    """The model that contributions start from."""

    base: Annotated[Place, about("Base model: directory, Hub id, URL or RUN.")]
    revision: Annotated[str | None, about("Revision of a Hub model: branch, tag or commit.", default="main")] = None

    def model(self) -> "Model":
        """Find the model. Raises ModelError."""
        from coldctl.artifacts import model_ref

        return model_ref.resolve(str(self.base), self.revision)


@dataclass(frozen=True)
class Target:
    """Where a model is published, and how."""

    to: Annotated[Place, about("Target: directory, URL or hf://ORG/NAME.")]
    private: Annotated[bool, about("On the Hub, make a new repository private.")] = False
    create_pr: Annotated[bool, about("On the Hub, open a pull request.")] = False
    dry_run: Annotated[bool, about("List what would be sent, and send nothing.")] = False


@dataclass(frozen=True)
class Making:
    """Where contributions go, and how their training is followed and kept safe."""

    output: Annotated[Place, about("Output: the contribution; for a suite its folder; or a RUN.")]
    sign_key: Annotated[Place | None, about("Private key (PEM) that signs the contribution.", default="none")] = None
    log: Annotated[str | None, about("Log of the training: jsonl, tensorboard or wandb.", default="none")] = None
    log_folder: Annotated[Place, about("Log folder: where log writes.")] = "coldctl-logs"
    checkpoint_seconds: Annotated[float, about("Checkpoint interval in seconds, against interruptions.")] = 60.0


def as_list(references: Place | Sequence[Place]) -> list[str]:
    """Return one reference, or several, as a list of texts."""
    if isinstance(references, str) or not isinstance(references, Iterable):
        return [str(references)]
    return [str(one) for one in references]
