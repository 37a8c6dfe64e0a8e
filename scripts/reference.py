"""Write the reference page of all settings, made from the settings classes: `reference.py docs/reference.md`."""

import sys
from pathlib import Path

from coldctl.config.fields import Setting, settings_of
from coldctl.config.settings import SECTIONS, DatasetConfig

HEAD = """\
# Settings

This page lists every setting: its key in a TOML file, its option on the command line, its type,
range and default. A flag wins over the file, the file over the default. Unknown keys are errors.

```
coldctl finetune my-data/ --base roberta-base --output mine --config settings.toml --epochs 3
```

An option is the key with dashes: `batch_size` is `--batch-size`. Every boolean has two options,
such as `--strict` and `--no-strict`. Options that are no settings are listed by
`coldctl COMMAND --help`. This page is generated from `src/coldctl/config/settings.py` by
`make reference`; do not edit it.
"""
COMMANDS = {
    "run": "`coldctl plan`",
    "finetune": "`coldctl finetune`; `evaluate` and `watch` read the table for the protocols that finetune",
    "fuse": "`coldctl fuse`; `watch` reads the table",
    "evaluate": "`coldctl evaluate`; `watch` reads the table",
    "publish": "`coldctl publish`",
}
ON_THE_COMMAND_LINE = ("text", "text_pair", "label", "license")  # of a dataset: what `finetune DATA` takes


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for section, kind in SECTIONS.items():
        parts.append(f"## `[{section}]`\n\nOptions of {COMMANDS[section]}.\n\n{table(kind)}")
    parts.append(
        "## `[[dataset]]`\n\nOne table per dataset of a suite. Those with an option describe the one dataset of\n"
        f"`coldctl finetune DATA`.\n\n{table(DatasetConfig, ON_THE_COMMAND_LINE)}"
    )
    return "\n".join(parts)


def table(kind: type, options: tuple[str, ...] | None = None) -> str:
    """Return the table of one settings class; `options` names those that are options, None means all."""
    rows = ["| key | option | type | range | default | meaning |", "|---|---|---|---|---|---|"]
    rows += [row(setting, options is None or name in options) for name, setting in settings_of(kind).items()]
    return "\n".join(rows) + "\n"


def row(setting: Setting, is_option: bool) -> str:
    """Return one line of a table."""
    flags = ", ".join(f"`{flag}`" for flag in setting.flag.split("/")) if is_option else ""
    cells = (f"`{setting.name}`", flags, setting.type_words, setting.range, setting.default_words, setting.help)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
