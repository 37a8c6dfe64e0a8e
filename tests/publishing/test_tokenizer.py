"""A published tokenizer: complete for older readers, telling nothing of where it came from, and giving the same ids.

What older readers make of it is tested with their own libraries in tests/with_tensorflow.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import run_coldctl
from helpers import tiny

TEXTS = [
    *tiny.SENTENCES,
    "",
    "  two  blanks ",
    "naïve “Café” 😀",
    "<mask> [MASK] </s>",
    "a quaxolotl, a QUAXOLOTL <e1>",
]
BPE = ("roberta", "modernbert")
WORDPIECE = ("bert", "distilbert", "electra", "mpnet")


def publish(source: Path, to: Path) -> tuple[Path, str]:
    ran = run_coldctl("publish", source, "--to", to, "--license", "mit")
    assert ran.code == 0, ran.stderr
    return to, ran.stderr


def ids(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(TEXTS)["input_ids"], tokenizer(TEXTS[:3], TEXTS[3:6])["input_ids"]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def with_more_tokens(kind: str, folder: Path) -> Path:
    """A tiny base to which tokens were added, saved by transformers."""
    from transformers import AutoModel, AutoTokenizer

    plain = tiny.make_base(kind, folder.with_name("plain"))
    tokenizer, model = AutoTokenizer.from_pretrained(plain), AutoModel.from_pretrained(plain)
    tokenizer.add_tokens(["quaxolotl"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<e1>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_ids_stay_the_same(tmp_path: Path, kind: str) -> None:
    base = tiny.make_base(kind, tmp_path / "base")
    published, printed = publish(base, tmp_path / "published")
    assert ids(published) == ids(base)
    vocabulary = read(base / "tokenizer.json")["model"]["vocab"]
    if kind in BPE:
        assert read(published / "vocab.json") == vocabulary
        merges = (published / "merges.txt").read_text(encoding="utf-8").splitlines()
        assert merges[0].startswith("#version")
        # Older tokenizers libraries know merges only as texts.
        assert read(published / "tokenizer.json")["model"]["merges"] == merges[1:] != []
    elif kind in WORDPIECE:
        lines = (published / "vocab.txt").read_text(encoding="utf-8").splitlines()
        assert {token: number for number, token in enumerate(lines)} == vocabulary
    else:
        assert "SentencePiece model" in printed
    assert (published / "special_tokens_map.json").is_file()


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "modernbert"])
def test_added_tokens_stay_beside_the_vocabulary(tmp_path: Path, kind: str) -> None:
    base = with_more_tokens(kind, tmp_path / "base")
    published, _ = publish(base, tmp_path / "published")
    assert ids(published) == ids(base)
    config = read(published / "tokenizer_config.json")
    assert config["additional_special_tokens"] == ["<e1>"]  # version 4 takes no list by the newer name
    assert "extra_special_tokens" not in config
    assert config["tokenizer_class"] != "TokenizersBackend"
    if kind in ("bert", "roberta"):
        assert set(read(published / "added_tokens.json")) == {"quaxolotl", "<e1>"}
        vocabulary = (published / ("vocab.json" if kind == "roberta" else "vocab.txt")).read_text(encoding="utf-8")
        assert "quaxolotl" not in vocabulary


def test_where_it_came_from_is_not_told(tmp_path: Path) -> None:
    base = tiny.make_base("roberta", tmp_path / "base")
    path = base / "tokenizer_config.json"
    private = {
        "name_or_path": "/home/ann/models/mine",
        "tokenizer_file": "/home/ann/models/mine/tokenizer.json",
        "some_file": "/home/ann/models/other.txt",
        "is_local": True,
        "local_files_only": True,
        "auto_map": {"AutoTokenizer": ["code.Mine", None]},
    }
    path.write_text(json.dumps({**read(path), **private}), encoding="utf-8")
    published, _ = publish(base, tmp_path / "published")
    assert not set(private) & set(read(published / "tokenizer_config.json"))
    assert all("/home/ann" not in file.read_text(encoding="utf-8") for file in published.glob("*.json"))
    assert ids(published) == ids(base)


def test_files_that_are_there_are_kept(tmp_path: Path) -> None:
    base = tiny.make_base("bert", tmp_path / "base")
    vocabulary = read(base / "tokenizer.json")["model"]["vocab"]
    text = "\r\n".join(sorted(vocabulary, key=vocabulary.get)) + "\r\n"
    (base / "vocab.txt").write_bytes(text.encode())
    published, _ = publish(base, tmp_path / "published")
    assert (published / "vocab.txt").read_bytes() == text.encode()
    base = tiny.make_base("roberta", tmp_path / "pairs")
    text = json.dumps(read(base / "tokenizer.json")["model"]["vocab"], indent=1)
    (base / "vocab.json").write_text(text)
    published, _ = publish(base, tmp_path / "published-pairs")
    assert (published / "vocab.json").read_text() == text


def test_what_is_no_tokenizer_is_told(tmp_path: Path, coldctl: Any) -> None:
    base = tiny.make_base("bert", tmp_path / "base")
    publish = ("publish", base, "--to", tmp_path / "p", "--license", "mit")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text("[]")
        ran = coldctl(*publish)
        assert (ran.code, f"{name} is not a JSON object" in ran.stderr) == (2, True), ran.stderr
    for path in base.glob("*token*"):
        path.unlink()
    ran = coldctl(*publish)
    assert (ran.code, "has no tokenizer" in ran.stderr) == (2, True), ran.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("padding", [1, 2])
def test_tensorflow_is_told_positions_where_it_would_count_others(padding: int, tmp_path: Path, coldctl: Any) -> None:
    base = tiny.make_base("roberta", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": padding}))
    ran = coldctl("publish", base, "--to", tmp_path / "p", "--license", "mit", "--dry-run", "--json")
    assert ran.code == 0, ran.stderr
    assert coldctl("publish", base, "--to", tmp_path / "p", "--license", "mit").code == 0
    card = (tmp_path / "p" / "README.md").read_text()
    assert "TFRobertaModel" in card
    assert ("position_ids" in card) == (padding != 1)
