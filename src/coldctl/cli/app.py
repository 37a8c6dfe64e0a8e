"""The program `coldctl`: its commands, wrong usage and Ctrl-C.

Each command imports what it runs when it is called, so that `--help` loads neither torch nor transformers.
"""

import gc
import json
import sys
from typing import Annotated, Any, NoReturn

import typer

from coldctl import __version__
from coldctl.cli import check, evaluate, finetune, fuse, publish, runs
from coldctl.cli.boundary import INTERRUPTED, interrupted
from coldctl.cli.options import with_options
from coldctl.common.text import printable

app = typer.Typer(
    name="coldctl",
    help="Recycle finetuned models by ColD Fusion: finetune, fuse, evaluate, publish, again.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command, _example in (
    (finetune.finetune, "my-data/ --base roberta-base --output contributions/mine"),
    (fuse.fuse, "contributions/ --base roberta-base --output fused"),
    (evaluate.evaluate, "fused --baseline roberta-base --suite suite.toml --output evaluation"),
    (publish.publish, "fused --to my-model --evaluation evaluation --license apache-2.0"),
    (check.check, "contributions/ --base roberta-base"),
    (check.lineage, "runs/demo/iteration-002/fused"),
    (runs.status, "runs/demo"),
    (runs.plan, "runs/demo --config configs/demo.toml --iterations 2"),
    (runs.promote, "runs/demo"),
    (runs.watch, "runs/demo --min-contributions 3 --every 10m --suite configs/demo.toml"),
):
    _kind = fuse.FuseCommand if _command is fuse.fuse else None
    _epilog = f"Example: coldctl {_command.__name__} {_example}"
    app.command(_command.__name__, cls=_kind, epilog=_epilog)(with_options(_command))


def _version(show: bool) -> None:
    if show:
        sys.stdout.write(f"coldctl {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Version: print it and end.")
    ] = False,
) -> None:
    """Recycle finetuned models by ColD Fusion (arXiv 2212.01378): finetune, fuse, evaluate, publish, again."""


def main() -> None:
    """Run the command line; the process ends with the exit code of the design."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:  # click's own: usage
        _usage(error)
    if code == INTERRUPTED:  # click's own answer to Ctrl-C, before or after a stage: within one the boundary answers
        interrupted()
    gc.freeze()  # the process ends: to search all of torch for garbage once more would take a second
    sys.exit(code)


def _usage(error: Exception) -> NoReturn:
    """Turn click's exceptions into our exit codes; anything else is a defect of ours and keeps its traceback."""
    code = getattr(error, "exit_code", None)
    if code is None:  # pragma: no cover - a defect of ours
        raise error
    message = _one_line(error)
    if "--json" in sys.argv[1:]:
        sys.stdout.write(json.dumps({"error": message, "details": [], "exit_code": code}) + "\n")
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def _one_line(error: Any) -> str:
    """Return click's usage error in our form: what is wrong, and which help tells more."""
    message = printable(" ".join(error.format_message().split())).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}: see {context.command_path if context else 'coldctl'} --help"
