"""Changes to documents that strangers might make: to bytes, to JSON trees, to tables, each by a random generator alone."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

NASTY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    1 << 31,
    (1 << 31) - 1,
    1 << 53,
    (1 << 61) - 1,
    1 << 62,
    1 << 63,
    1 << 64,
    -(1 << 63),
    10**30,
    10**120,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "a",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "a" * 300,
    "a" * 3000,
    "\0",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "\n# head\n",
    "<script>",
    "{{ 7 * 7 }}",
    "%s%n",
    "1e9",
    "F32",
    "BF16",
    "I64",
    [],
    {},
    [[]],
    [0],
    [0, 0],
    [-1, 4],
    [1 << 61, 0],
    [4, 4],
    {"": 0},
    {"a": {"a": {}}},
    ["a"] * 40,
)
_LINE_BITS = (
    b'"',
    b'""',
    b",",
    b"\t",
    b"\r",
    b"\n",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    "\u2028".encode(),
    b"'",
    b"\\",
)


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to eight changes of bytes: flipped, replaced, removed, repeated, moved, cut off."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not found:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(64)))
        at = rng.randrange(len(found))
        until = min(len(found), at + rng.choice((1, 2, 4, 8, 64)))
        kind = rng.randrange(8)
        if kind == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            del found[at:until]
        elif kind == 3:
            found[at:at] = found[at:until] * rng.choice((1, 2, 16))
        elif kind == 4:
            there = rng.randrange(len(found))
            found[there : there + until - at] = found[at:until]
        elif kind == 5:
            del found[at:]
        elif kind == 6:
            number = rng.choice((0, 1, -1, 1 << 31, (1 << 63) - 1, len(found)))
            found[at : at + 8] = struct.pack("<q", number)[: rng.choice((2, 4, 8))]
        else:
            found[at:at] = rng.choice(_LINE_BITS)
    return bytes(found)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with every key or index in it."""
    found, level = [], [tree]
    while level:
        node = level.pop()
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            level.append(node[key])
    return found


def of_tree(rng: random.Random, tree: Any) -> Any:
    """A tree with one to four values replaced, removed, renamed, copied elsewhere, wrapped, or made larger."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(tree)
        if not places:
            return rng.choice(NASTY)
        node, key = rng.choice(places)
        value, kind = node[key], rng.randrange(9)
        if kind <= 2:
            node[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 3:
            del node[key]
        elif kind == 4 and isinstance(node, dict):
            node[str(rng.choice(NASTY))[:400]] = node.pop(key)
        elif kind == 5:
            other, there = rng.choice(places)
            if isinstance(other, dict) or there < len(other):
                other[there] = copy.deepcopy(value)
        elif kind == 6:
            for _ in range(rng.choice((1, 2, 40))):
                value = [value] if rng.random() < 0.5 else {"a": value}
            node[key] = value
        elif kind == 7 and isinstance(value, int | float):
            node[key] = rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
        elif kind == 8 and isinstance(value, list):
            node[key] = value * rng.choice((0, 2, 3, 50))
        else:
            node[key] = copy.deepcopy(rng.choice(NASTY))
    return tree


def _spelt(rng: random.Random, tree: Any) -> bytes:
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.1:  # a name twice
        text = text.replace("{", '{"a": 1, "a": 2, ', 1) if rng.random() < 0.5 else text + text
    return text.encode(errors="surrogatepass")


def of_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON document with its tree changed, or now and then its bytes."""
    if rng.random() < 0.15:
        return of_bytes(rng, data)
    try:
        return _spelt(rng, of_tree(rng, json.loads(data)))
    except (ValueError, RecursionError):
        return of_bytes(rng, data)


def of_json_lines(rng: random.Random, data: bytes) -> bytes:
    """Lines of JSON, some of them changed, moved or repeated."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(4)
        if kind <= 1:
            lines[at] = of_json(rng, lines[at])
        elif kind == 2:
            lines.insert(at, rng.choice(lines))
        else:
            del lines[at]
            lines = lines or [b""]
    return b"\n".join(lines)


def of_table(rng: random.Random, data: bytes) -> bytes:
    """A table with quotes, line ends, delimiters and cells where none should be."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        found[at:at] = rng.choice(_LINE_BITS) * rng.choice((1, 1, 1, 3, 200))
    return of_bytes(rng, bytes(found)) if rng.random() < 0.4 else bytes(found)


def of_toml(rng: random.Random, data: bytes) -> bytes:
    """A TOML document with its tree changed where it can be spelt again, else its bytes and lines."""
    import tomllib

    import tomli_w

    if rng.random() < 0.5:
        try:
            return tomli_w.dumps(of_tree(rng, tomllib.loads(data.decode()))).encode()
        except Exception:
            return of_bytes(rng, data)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    value = rng.choice(
        (b"0xffffffffffffffffffff", b"1979-05-27", b"07:32:00", b"inf", b"nan", b"[[[[]]]]", b"{a.b.c = 1}", b"'''x")
    )
    key = rng.choice((b"epochs", b"a.b.c", b'"\\u0000"', b"name", b"base", b"path", b"[a.b", b"[[dataset"))
    lines.insert(at, key + rng.choice((b" = ", b"]", b"]]\n", b"=")) + value)
    return of_bytes(rng, b"\n".join(lines)) if rng.random() < 0.3 else b"\n".join(lines)


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header's tree is changed, mostly with its length put right."""
    if rng.random() < 0.2 or len(data) < 8:
        return of_bytes(rng, data)
    length = min(struct.unpack("<Q", data[:8])[0], len(data))
    header, rest = of_json(rng, data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.15:
        rest = rest[: rng.randrange(len(rest) + 1)] + bytes(rng.choice((0, 0, 1, 64)))
    stated = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) + 1, 1 << 20, 1 << 63))
    return struct.pack("<Q", stated) + header + rest
