"""A short seeded fuzzing of every parser of strangers' bytes; `make fuzz` is the long one. Inputs that once broke one stay."""

import json

import pytest
import samples
from fuzzing import Feeder, feed_seeded
from targets import TARGETS

BY_NAME = {target.name: target for target in TARGETS}
_SLOW = ("dataset", "tokenizer", "pickle")
_SUITE = samples.SUITE
_DEEP: list[object] = [[]]
for _ in range(20):
    _DEEP = [_DEEP]
# What fuzzing found, by target: each ended in a traceback, or took too long.
FOUND: list[tuple[str, bytes]] = [
    ("weights index", samples.spelt({"weight_map": {"bert.a": samples.SHARDS[0], "bert.b": "a" * 300}})),
    ("weights index", samples.spelt({"weight_map": {"bert.a": samples.SHARDS[0], "bert.b": "a\0b"}})),
    ("TOML suite", _SUITE.replace('"org/base"', "-9").encode()),
    ("TOML suite", _SUITE.replace('"org/base"', f'"{"a" * 5000}"').encode()),
    ("TOML suite", _SUITE.replace('path = "tweets"', 'path = "~nobody-at-all/x"').encode()),
    ("TOML suite", _SUITE.replace('path = "tweets"', r'path = "a\u0000b"').encode()),
    ("TOML suite", _SUITE.replace("epochs = 2", "epochs = 1979-05-27").encode()),
    ("TOML suite", _SUITE.replace("epochs = 2", f"epochs = 0x{'f' * 5000}").encode()),
    ("tokenizer.json", samples.tokenizer().replace(b'"[UNK]": 1', b'"[UNK]": ' + json.dumps(_DEEP).encode())),
    ("tokenizer.json", samples.merging_tokenizer().replace(b'["a", "b"]', b'["a", 7]')),
    ("tokenizer_config.json", rb'{"\ud800": 1, "pad_token": "[PAD]"}'),
    ("tokenizer_config.json", b'{"extra_special_tokens": ["a"], "additional_special_tokens": 7}'),
    ("TOML suite", _SUITE.replace("contributors = 3", "contributors = 2147483647").encode()),
    ("dataset .jsonl", b'{"text": "a", "label": "' + b"9" * 900 + b'"}\n' + samples.lines(samples.rows(("1", "2")))),
]


@pytest.mark.parametrize("name", BY_NAME)
def test_only_our_errors_come_out(name: str) -> None:
    tally = feed_seeded(BY_NAME[name], 150 if name.startswith(_SLOW) else 400, seed=0)
    assert tally.refused > 20
    assert len(tally.messages) >= 3


@pytest.mark.parametrize(("name", "data"), FOUND, ids=lambda value: value if isinstance(value, str) else "")
def test_what_was_found_stays_mended(name: str, data: bytes) -> None:
    feeder = Feeder(BY_NAME[name], "own")
    try:
        feeder.feed(data)
    finally:
        feeder.close()
