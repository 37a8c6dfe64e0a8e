"""A short seeded fuzzing of every parser of strangers' bytes; `make fuzz` is the long one. Inputs that once broke one stay."""

import base64
import json
import zlib

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
# A page that claims 2 GiB, for which the reader would make room.
_PAGE_OF_TWO_GIBIBYTES = zlib.decompress(
    base64.b85decode(
        "c-n1K!EV|>5FIa$L5KrX-PNu{B@T|&14(TXD5;Xe8U+*uRD#l?M!6WUC=y91(2(X>_0&TSRS!{5J@*s(5&fFp+u1cHNbN|oGqW@E=8d&(%Z^7)"
        "`rDu%|11S=Z3_VA;my3@(lmIeCDa|%UDPsa1@$><m8Q+TWNzSkZZhuiJZe!+`6=a30G%x2!=ro!o?1G;$0O_Ja@fKRb0eEPy}thmfQ64KZ|Zu0"
        "v~6HMP)83D8D;0xrZHklBN{z!1R5u49}zoYC__zgUIuQ>`ftOFfSN!vn}nNc=q5DtSX?H2V;uCtF(uS$?yDP<o8!@JPDxaq49DR`co{b^F7l%2"
        "K%Qnq8LX^`;3#37eM+z|#Q9-3ssHaNifSPR49J|oKKp72OE|z0cnz`|QPMQx@i@R{pAB|rIKPPVjjZqdFRm>do)L9~wH4<(lW`}-z9&HBc}8|R"
        "FS{?IZ^G}%GbPobL^+X>980;7{!rGX9LkzbN#B>UrJS0SNBZKy%E<L+tN8d<fueKRs_V;zIuB($#n+>Bs@JHG&blgJ8!9TLHXbTGd8LaQa-G@|"
        "zcF^tx~`5tsQMcXh9usoQLW{$xXJfB+V&s#$`zkM<Mr-f6`w5g2M53llVJMpeK_ChPbOQzbb7TYT!+)y=<2dis%*R4o+#pzP_JS{0NVHi{RL`*"
        "t#$"
    )
)
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
    ("TOML experiment", samples.EXPERIMENT.replace("epochs = 1", f"epochs{'.a' * 100} = 1").encode()),
    ("tokenizer.json", samples.tokenizer().replace(b'"[UNK]": 1', b'"[UNK]": ' + json.dumps(_DEEP).encode())),
    ("tokenizer.json", samples.merging_tokenizer().replace(b'["a", "b"]', b'["a", 7]')),
    ("tokenizer_config.json", rb'{"\ud800": 1, "pad_token": "[PAD]"}'),
    ("tokenizer_config.json", b'{"extra_special_tokens": ["a"], "additional_special_tokens": 7}'),
    ("TOML suite", _SUITE.replace("contributors = 3", "contributors = 2147483647").encode()),
    ("dataset .parquet", _PAGE_OF_TWO_GIBIBYTES),
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
