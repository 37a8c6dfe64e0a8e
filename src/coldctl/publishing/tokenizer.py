"""Copy a tokenizer's files, complete for the slow classes of transformers 4.

transformers 5 saves only `tokenizer.json` and `tokenizer_config.json`. Version 4's slow classes want `vocab.json` and
`merges.txt`, or `vocab.txt`; its fast ones may come with a tokenizers library that knows merges only as "a b".
"""

import json
from pathlib import Path
from typing import Any, TypedDict

from coldctl.artifacts import layout
from coldctl.common import text
from coldctl.common.errors import CheckpointError
from coldctl.common.parsing import find_mismatch, json_value
from coldctl.storage.local import SMALL_FILE_LIMIT, Folder

_TOKENIZER, _CONFIG, _SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_ADDED = "added_tokens.json"
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Where the tokenizer came from, which is private, and code of its own, which is never run.
_DROPPED = (
    "name_or_path",
    "_name_or_path",
    "auto_map",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "is_local",
    "local_files_only",
)
_MOST_VALUES = 5_000_000  # of tokenizer.json: the largest vocabularies come with half a million merges
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # transformers 5's name for it, and the one both know


class _AddedToken(TypedDict, total=False):
    content: str
    id: int


class _TokenizerModel(TypedDict, total=False):
    merges: list[str | list[str]]
    vocab: dict[str, int] | list[Any] | None  # a unigram model lists its pieces


class _Tokenizer(TypedDict, total=False):
    """`tokenizer.json`, as far as it is read here."""

    added_tokens: list[_AddedToken]
    model: _TokenizerModel


def copy(source: Folder, folder: Path) -> list[str]:
    """Copy the tokenizer's files into `folder`, and write those that older readers need. Return what is still missing.

    Raises CheckpointError if a file is not readable.
    """
    for name in layout.TOKENIZER_FILES:
        if source.has(name):
            (folder / name).write_bytes(source.read(name))
    config = _object(folder / _CONFIG)
    if config is not None:
        config = _config_for_all(config)
        _write(folder / _CONFIG, config)
        special = {key: config[key] for key in _SPECIAL_KEYS if config.get(key) is not None}
        if special and not (folder / _SPECIAL).exists():
            _write(folder / _SPECIAL, special)
    tokenizer = _object(folder / _TOKENIZER)
    return [] if tokenizer is None else _vocabulary(tokenizer, folder)


def _config_for_all(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _DROPPED and not text.is_path(value)}
    if kept.get("tokenizer_class") == _GENERIC[0]:
        kept["tokenizer_class"] = _GENERIC[1]
    extra = kept.get("extra_special_tokens")
    if isinstance(extra, list):  # version 4 wants names with them, and knows these by another key, which 5 still reads
        del kept["extra_special_tokens"]
        tokens = _list(kept.get("additional_special_tokens"))
        kept["additional_special_tokens"] = [*tokens, *(token for token in extra if token not in tokens)]
    return kept


def _vocabulary(tokenizer: dict[str, Any], folder: Path) -> list[str]:
    """Write the slow classes' files from the fast one's. Return what is still missing."""
    if mismatch := find_mismatch(tokenizer, _Tokenizer):
        raise CheckpointError(f"{_TOKENIZER}: {mismatch}. Copy the base model's.")
    model = tokenizer.get("model", {})
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        pieces = any((folder / name).exists() for name in layout.SENTENCEPIECE_FILES)
        return [] if pieces else ["the SentencePiece model that slow tokenizers of older transformers read"]
    ordered = sorted(vocabulary, key=lambda token: (vocabulary[token], token))
    # Tokens that were added stay out of the vocabulary, as version 4 saves them: in it they would count as word pieces.
    added = {
        token["content"]: token["id"]
        for token in tokenizer.get("added_tokens", [])
        if "content" in token and "id" in token and token["content"] not in vocabulary
    }
    if added and not (folder / _ADDED).exists():
        _write(folder / _ADDED, added)
    if "merges" in model:
        return _merges(tokenizer, ordered, folder)
    if (folder / "vocab.txt").exists():
        return []
    gapless = [vocabulary[token] for token in ordered] == list(range(len(ordered)))  # a line's number is the token's id
    lines_hold = all("\n" not in token for token in ordered)
    if not gapless or not lines_hold:
        return ["vocab.txt: its token ids have gaps, or its tokens line breaks"]
    (folder / "vocab.txt").write_text("\n".join(ordered) + "\n", encoding="utf-8")
    return []


def _merges(tokenizer: dict[str, Any], ordered: list[str], folder: Path) -> list[str]:
    """Write `vocab.json` and `merges.txt`, and merges as older readers know them. Return what is still missing."""
    model = tokenizer["model"]
    merges, vocabulary = model["merges"], model["vocab"]
    pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]
    plain = all(len(pair) == 2 and not any(" " in symbol for symbol in pair) for pair in pairs)
    if plain and any(isinstance(merge, list) for merge in merges):
        model["merges"] = [" ".join(pair) for pair in pairs]
        (folder / _TOKENIZER).write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
    if not (folder / "vocab.json").exists():
        text = json.dumps({token: vocabulary[token] for token in ordered}, ensure_ascii=False)
        (folder / "vocab.json").write_text(text, encoding="utf-8")
    if plain and not (folder / "merges.txt").exists():
        lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [] if plain else ["merges that older readers know: its own hold blanks"]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        document = json_value(path.read_bytes(), SMALL_FILE_LIMIT, _MOST_VALUES)
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not readable JSON ({error}): copy the base model's") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path.name} is not a JSON object: copy the base model's")
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
