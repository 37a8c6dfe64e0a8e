"""Clean a stranger's config and tokenizer files before transformers loads them.

`config.json` and `tokenizer_config.json` can ask the library to import the checkpoint's own code, to fetch kernels from
the Hub, or to open files by absolute paths. Links can lead out of the directory. So both files are copied without such
settings into a temporary directory, and transformers loads them from there, with links to the weight files whose headers
were checked.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import CONFIG_LIMIT, read_model_config
from coldctl.checkpoints.header import HEADER_LIMIT, json_object
from coldctl.common.errors import ModelError
from coldctl.storage.local import Folder, LocalFolder
from coldctl.storage.location import Location

CODE = (
    "auto_map", "auto_mapping", "custom_pipelines", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "kernel_config", "use_kernels",
)  # fmt: skip
_HARMLESS = ("eager", "sdpa", None)  # implementations that are torch's own
_PLACES = (
    "name_or_path", "_name_or_path", "vocab_file", "merges_file", "tokenizer_file", "spm_file", "sp_model", "tokenizer_object",
    "special_tokens_map_file", "added_tokens_file", "tokenizer_config_file", "fast_tokenizer_files",
)  # fmt: skip
# Other files than those that were checked, a head that is not used (num_labels creates as many names), other outputs.
UNUSED = (
    "transformers_weights", "configuration_files", "fusion_config", "num_labels", "id2label", "label2id", "problem_type",
    "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript",
)  # fmt: skip
_TOKENIZER_CONFIG = "tokenizer_config.json"


def code_named_in(document: Mapping[str, Any]) -> list[str]:
    """Return the keys of a config that ask for code other than the library's own."""
    return [key for key in CODE if key in document and document[key] not in _HARMLESS]


def note(config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None) -> str | None:
    """Return a note on the custom code that a checkpoint names, to follow the checkpoint's name; None if it names none."""
    keys = dict.fromkeys([*code_named_in(config), *code_named_in(tokenizer or {})])
    return f"names custom code ({', '.join(keys)}), which is ignored" if keys else None


def note_on(folder: Folder) -> str | None:
    """Return `note` for a checkpoint that is loaded with its tokenizer. Raises CheckpointError or ModelError."""
    return note(read_model_config(folder), _tokenizer_config(folder))


@contextmanager
def config_of(folder: Folder) -> Iterator[Path]:
    """Yield a directory with only the cleaned `config.json`. Raises ModelError for a quantised model, or no encoder."""
    config = read_model_config(folder)
    if config.get("quantization_config") is not None:
        raise ModelError(f"{folder.label} is quantised, which cannot be trained or measured: take the original weights")
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        place = Path(scratch)
        _write(place / layout.MODEL_CONFIG, _cleaned(config))
        yield place


@contextmanager
def weights_of(folder: LocalFolder, files: Iterable[str]) -> Iterator[Path]:
    """Yield a directory with only these weight files of a checkpoint, as links, and their index. Raises CheckpointError."""
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        place = Path(scratch)
        for name in files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).symlink_to((folder.path / name).resolve())
        if not (place / layout.WEIGHTS).exists():
            (place / layout.WEIGHTS_INDEX).write_bytes(folder.read(layout.WEIGHTS_INDEX, HEADER_LIMIT))
        yield place


@contextmanager
def tokenizer_of(folder: Folder) -> Iterator[Path]:
    """Yield a directory with the tokenizer's files and both configs, cleaned. Raises CheckpointError or ModelError."""
    with config_of(folder) as place:
        copy_tokenizer(folder, place)
        yield place


def copy_tokenizer(source: Folder, target: Location) -> None:
    """Copy a tokenizer's files unchanged, except a config that names code or paths: it is cleaned."""
    for name in layout.TOKENIZER_FILES:
        if source.has(name):
            (target / name).write_bytes(source.read(name))
    settings = _tokenizer_config(source)
    if settings is not None and (cleaned := _cleaned(settings)) != settings:
        _write(target / _TOKENIZER_CONFIG, cleaned)


def _tokenizer_config(folder: Folder) -> dict[str, Any] | None:
    if not folder.has(_TOKENIZER_CONFIG):
        return None
    return json_object(folder.read(_TOKENIZER_CONFIG, CONFIG_LIMIT), f"{folder.label}/{_TOKENIZER_CONFIG}")


def _cleaned(document: Mapping[str, Any]) -> dict[str, Any]:
    dropped = {*code_named_in(document), *_PLACES, *UNUSED}
    return {key: value for key, value in document.items() if key not in dropped}


def _write(path: Location, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=True), encoding="utf-8")
