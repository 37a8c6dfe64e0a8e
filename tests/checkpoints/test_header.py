"""`checkpoints/checkpoint.py` on safetensors files written by hand: what is read where, digests by the contract's own words."""

import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from coldctl.artifacts import layout
from coldctl.checkpoints import checkpoint as checkpoints
from coldctl.checkpoints import digests, header
from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.header import Tensor
from coldctl.common.errors import CheckpointError, ModelError
from coldctl.storage.local import LocalFolder

CODES = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64", np.dtype(ml_dtypes.bfloat16): "BF16"}
Arrays = dict[str, Any]
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.int64)
C = np.arange(5).astype(ml_dtypes.bfloat16)


def encoded(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def weights(arrays: Arrays) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]
        }  # fmt: skip
        end += array.nbytes
    return encoded(header, b"".join(array.tobytes() for array in arrays.values()))


def entry(**changed: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / layout.MODEL_CONFIG).write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    return tmp_path


def opened(place: Path, arrays: Arrays | None = None) -> Checkpoint:
    if arrays is not None:
        (place / layout.WEIGHTS).write_bytes(weights(arrays))
    return checkpoints.open_checkpoint(LocalFolder(place), "model")


def refused(place: Path, data: bytes, words: str) -> None:
    (place / layout.WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        opened(place)


# What is where --------------------------------------------------------------------------------------------------


def test_tensors_are_found_and_read(place: Path) -> None:
    found = opened(place, {"b": B, "a": A, "c": C})
    assert list(found.body) == ["a", "b", "c"]
    assert found.manifest is None
    assert found.files == {layout.WEIGHTS: (place / layout.WEIGHTS).stat().st_size}
    for name, array in (("a", A), ("b", B), ("c", C)):
        assert np.array_equal(found.read(name), array)
        assert found.read(name).dtype == array.dtype
    assert [(item.size, item.nbytes, item.floating) for item in found.body.values()] == [
        (6, 24, True), (4, 32, False), (5, 10, True),
    ]  # fmt: skip
    part = bytearray(8)
    found.read_into("a", 3, memoryview(part))
    assert np.frombuffer(part, np.float32).tolist() == [3, 4]
    assert found.floats("a", 3, 5).tolist() == [3, 4]


def test_a_checkpoint_reaches_another_process_without_its_open_files(place: Path) -> None:
    found = checkpoints.shared(opened(place, {"a": A}))
    assert np.array_equal(found.read("a"), A)
    sent = pickle.loads(pickle.dumps(found))
    assert np.array_equal(sent.read("a"), A)
    assert pickle.dumps(found) == pickle.dumps(checkpoints.shared(opened(place)))


def test_heads_are_apart_and_old_names_are_modern(place: Path) -> None:
    found = opened(
        place, {"bert.x.LayerNorm.gamma": A, "classifier.weight": A, "bert.x.LayerNorm.beta": C, "bert.y": B}
    )
    assert list(found.body) == ["x.LayerNorm.bias", "x.LayerNorm.weight", "y"]
    refused(place, weights({"bert.LayerNorm.gamma": A, "bert.LayerNorm.weight": A}), "two tensors are called")
    assert opened(place, {"cls.x": A}).body.keys() == {"cls.x"}  # a bare encoder: no prefix to take off
    refused(place, weights({}), "holds no tensors")


def test_what_is_no_encoder_is_refused(place: Path) -> None:
    (place / layout.WEIGHTS).write_bytes(weights({"a": A}))
    for config, words in (
        ({"model_type": "gpt2"}, "is a gpt2 model .no architecture named., not a text encoder, says its config.json: "),
        ({"model_type": "bert", "is_decoder": True}, "not a text encoder"),
        ({"model_type": "bert", "is_encoder_decoder": True}, "not a text encoder"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "not a text encoder"),
        ({"architectures": ["BertModel"]}, "names no model_type"),
        ({"model_type": "bert", "architectures": "BertModel"}, "names no model_type"),
        ({"model_type": "bert", "architectures": [7]}, "names no model_type"),
    ):
        (place / layout.MODEL_CONFIG).write_text(json.dumps(config))
        with pytest.raises(ModelError, match=words):
            opened(place)
    for fine in ({"model_type": "bert"}, {"model_type": "bert", "architectures": []}):
        (place / layout.MODEL_CONFIG).write_text(json.dumps(fine))
        assert opened(place).config == fine
    (place / layout.MODEL_CONFIG).unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        opened(place)
    (place / layout.DELTA_WEIGHTS).touch()
    with pytest.raises(ModelError, match="a difference from its base"):
        opened(place)


def test_weights_that_are_not_there(place: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        opened(place)
    (place / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only pickled weights .pytorch_model\.bin."):
        opened(place)


# Headers --------------------------------------------------------------------------------------------------------


def test_the_size_of_a_header(place: Path) -> None:
    refused(place, b"", "too short")
    refused(place, bytes(7), "too short")
    refused(place, bytes(8), "not readable JSON")  # a header of nothing
    whole = encoded({"a": entry()}, bytes(8))
    (place / layout.WEIGHTS).write_bytes(whole)
    assert opened(place).body["a"] == Tensor("F32", (2,), layout.WEIGHTS, len(whole) - 8)
    refused(place, struct.pack("<Q", 3) + b"{}", "claims a header of 3 bytes in a file of 10")
    refused(place, struct.pack("<Q", 2) + b"{}", "holds no tensors")
    assert header.HEADER_LIMIT == 4 << 20
    for length, words in ((header.HEADER_LIMIT, "not readable JSON"), (header.HEADER_LIMIT + 1, "claims")):
        with (place / layout.WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(length + 100)
        with pytest.raises(CheckpointError, match=words):
            opened(place)


def test_tensors_cover_the_data(place: Path) -> None:
    one, two = entry(data_offsets=[0, 8]), entry(data_offsets=[8, 16])
    (place / layout.WEIGHTS).write_bytes(encoded({"b": two, "a": one}, bytes(16)))  # in any order
    assert len(opened(place).body) == 2
    refused(place, encoded({"a": one}, bytes(9)), "holds 9 bytes of data, its header says 8")
    refused(place, encoded({"a": one}, bytes(7)), "holds 7 bytes of data, its header says 8")
    refused(place, encoded({"a": two}, bytes(16)), "'a' starts at byte 8, not at 0")
    refused(place, encoded({"a": one, "b": entry(data_offsets=[12, 20])}, bytes(20)), "'b' starts at byte 12, not at 8")
    refused(place, encoded({"a": one, "b": entry(data_offsets=[4, 12])}, bytes(12)), "'b' starts at byte 4, not at 8")
    empty = entry(shape=[0, 3], data_offsets=[8, 8])
    (place / layout.WEIGHTS).write_bytes(encoded({"a": one, "e": empty}, bytes(8)))
    assert opened(place).read("e").shape == (0, 3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (entry(shape=[3]), "does not fill its 8 bytes"),
        (entry(shape=[-2]), "impossible"),
        (entry(shape=[2.0]), "impossible"),
        (entry(shape=[True, 2]), "impossible"),
        (entry(shape=2), "impossible"),
        (entry(shape=[1] * 16 + [2]), "impossible"),
        (entry(shape=[2], data_offsets=[-8, 0]), "impossible"),
        (entry(shape=[0, 1 << 62], data_offsets=[0, 0]), "impossible"),
        (entry(shape=[0, 1 << 31, 1 << 31], data_offsets=[0, 0]), "impossible"),
        (entry(data_offsets=[0, 1 << 62]), "impossible"),
        (entry(data_offsets=[0]), "lacks dtype, shape or data_offsets"),
        (entry(dtype="F31"), "'F31', which is not supported"),
        (entry(dtype=["F32"]), "not supported"),
        (7, "lacks dtype"),
        ([], "lacks dtype"),
    ],
)
def test_entries_of_a_header(wrong: Any, words: str, place: Path) -> None:
    refused(place, encoded({"a": wrong}, bytes(8)), words)


def test_entries_at_the_limits(place: Path) -> None:
    for shape in ([1] * 15 + [2], [2, *[1] * 15], [1, 2]):
        (place / layout.WEIGHTS).write_bytes(encoded({"a": entry(shape=shape)}, bytes(8)))
        assert opened(place).body["a"].shape == tuple(shape)
    largest = entry(shape=[0, (1 << 62) - 1], data_offsets=[0, 0])
    (place / layout.WEIGHTS).write_bytes(encoded({"a": largest}))
    assert opened(place).body["a"].size == 0
    scalar = entry(shape=[], data_offsets=[0, 4])
    (place / layout.WEIGHTS).write_bytes(encoded({"a": scalar}, bytes(4)))
    assert opened(place).read("a").shape == ()


def test_names_of_tensors(place: Path) -> None:
    longest = "n" * 500
    (place / layout.WEIGHTS).write_bytes(encoded({longest: entry()}, bytes(8)))
    assert list(opened(place).body) == [longest]
    for name in (longest + "n", "a\0b", "a\x1bb"):
        refused(place, encoded({name: entry()}, bytes(8)), "is no name of a tensor")


def test_the_number_of_tensors(place: Path) -> None:
    def empty(count: int, first: int = 0) -> dict[str, Any]:
        return {f"t{first + number}": entry(shape=[0], data_offsets=[0, 0]) for number in range(count)}

    (place / layout.WEIGHTS).write_bytes(encoded(empty(20_000)))
    assert len(opened(place).body) == 20_000
    refused(place, encoded(empty(20_001)), "more than 20000 tensors")
    (place / layout.WEIGHTS).unlink()
    for more, found in ((0, 20_000), (1, None)):
        shards = {"s1": empty(15_000), "s2": empty(5_000 + more, 15_000)}
        for shard, entries in shards.items():
            (place / shard).write_bytes(encoded(entries))
        where = {name: shard for shard, entries in shards.items() for name in entries}
        (place / layout.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": where}))
        if found:
            assert len(opened(place).body) == found
        else:
            with pytest.raises(CheckpointError, match="more than 20000 tensors"):
                opened(place)


# Shards ---------------------------------------------------------------------------------------------------------


def sharded(place: Path, shards: dict[str, Arrays], where: Any) -> Checkpoint:
    for name, arrays in shards.items():
        (place / name).write_bytes(weights(arrays))
    (place / layout.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": where}))
    return opened(place)


def test_shards(place: Path) -> None:
    shards: dict[str, Arrays] = {"s1.safetensors": {"a": A}, "s2.safetensors": {"c": C, "b": B}}
    where = {name: shard for shard, arrays in shards.items() for name in arrays}
    found = sharded(place, shards, where)
    assert list(found.body) == ["a", "b", "c"]
    assert list(found.files) == ["s1.safetensors", "s2.safetensors"]
    assert np.array_equal(found.read("c"), C)
    assert digests.body_digest(found) == digest_by_hand({"a": A, "c": C})
    for wrong, words in (
        ({"a": "s1.safetensors", "b": "s2.safetensors"}, "'c' stands in s2.safetensors but not in the index"),
        ({**where, "a": "s2.safetensors", "d": "s1.safetensors"}, "'a' stands in s1.safetensors but not in the index"),
        ({**where, "d": "s1.safetensors"}, "the index names 'd', which no shard holds"),
        ([], "has no weight_map"),
        ({"a": 1}, "has no weight_map"),
    ):
        with pytest.raises(CheckpointError, match=words):
            sharded(place, shards, wrong)
    (place / layout.WEIGHTS_INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        opened(place)


# Digests --------------------------------------------------------------------------------------------------------


def digest_by_hand(arrays: Arrays) -> str:
    hasher = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        hasher.update(f"{name}\0{CODES[array.dtype]}\0{','.join(map(str, array.shape))}\0".encode() + array.tobytes())
    return "sha256:" + hasher.hexdigest()


def test_the_body_digest(place: Path) -> None:
    found = opened(place, {"bert.b": B, "bert.a": A, "cls": C, "bert.c": C})
    assert digests.body_digest(found) == digest_by_hand({"a": A, "c": C})
    large = np.arange((digests._CHUNK // 4) * 2 + 3, dtype=np.float32)  # more than is hashed at a time
    assert digests.body_digest(opened(place, {"a": large})) == digest_by_hand({"a": large})
    assert digests._CHUNK == 4 << 20


def test_what_is_outside_the_body(place: Path) -> None:
    """The digest is over all bytes but the floating tensors' of the body, in the order of the file."""
    large = np.arange(digests._CHUNK // 4 + 9, dtype=np.float32)
    arrays: Arrays = {"cls": large, "bert.a": A, "bert.b": B, "bert.c": C, "end": A}
    found = opened(place, arrays)
    data = (place / layout.WEIGHTS).read_bytes()
    start = len(data) - sum(array.nbytes for array in arrays.values())
    expected = data[: start + large.nbytes] + B.tobytes() + A.tobytes()
    assert digests.outside_body(found) == {layout.WEIGHTS: "sha256:" + hashlib.sha256(expected).hexdigest()}


def test_common_rows(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    more = np.arange(15, dtype=np.float32).reshape(5, 3)
    name, position = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    base = opened(place, {name: A, position: A, "w": A})
    other_place = tmp_path_factory.mktemp("other")
    (other_place / layout.MODEL_CONFIG).write_text('{"model_type": "bert"}')
    other = opened(other_place, {name: more, position: more, "w": more})
    cut = checkpoints.with_common_rows(base, other)
    assert cut.body[name].shape == (2, 3)
    assert np.array_equal(cut.read(name), more[:2])
    assert cut.body[position].shape == (5, 3)
    assert cut.body["w"].shape == (5, 3)
    assert cut.original is other
    assert digests.body_digest(cut) == digests.body_digest(other)
    assert digests.outside_body(cut) == digests.outside_body(other)
    narrow = {rows: opened(place, {name: np.zeros((rows, 1), np.float32)}) for rows in (2, 5)}
    assert checkpoints.with_common_rows(narrow[2], narrow[5]).body[name].shape == (2, 1)
    assert checkpoints.with_common_rows(narrow[5], narrow[2]).body[name].shape == (2, 1)
    assert checkpoints.with_common_rows(base, base) is base
    wider = opened(other_place, {name: np.zeros((5, 4), np.float32)})
    assert checkpoints.with_common_rows(base, wider) is wider
    unknown = opened(other_place, {"tok_embeddings.weight": more})
    assert checkpoints.with_common_rows(base, unknown) is unknown
    for item, expected in (
        ("embeddings.word_embeddings.weight", True), ("embeddings.tok_embeddings.weight", True),
        ("embeddings.position_embeddings.weight", False), ("embeddings.token_type_embeddings.weight", False),
        ("encoder.layer.0.weight", False),
    ):  # fmt: skip
        assert checkpoints.is_vocabulary(item) is expected


def test_companions(place: Path) -> None:
    found = opened(place, {"a": A, "pooler.x": A, "b": B})
    for arrays in ({"a": A + 1}, {"a": C[:0].reshape(0)}, {"pooler.x": A}, {"a": B[:1]}, {"a": A, "pooler.x": C}):
        (place / "extra.safetensors").write_bytes(weights(arrays))
        if set(arrays) == {"a"} and arrays["a"].shape == A.shape:
            extra = checkpoints.open_companion(found, "extra.safetensors")
            assert np.array_equal(extra.read("a"), A + 1)
            assert extra.files == {"extra.safetensors": (place / "extra.safetensors").stat().st_size}
            continue
        with pytest.raises(CheckpointError, match="has no tensor"):
            checkpoints.open_companion(found, "extra.safetensors")
    (place / "extra.safetensors").write_bytes(weights({"a": np.zeros(A.shape, np.int64)}))
    with pytest.raises(CheckpointError, match="has no tensor a of the body's shape"):
        checkpoints.open_companion(found, "extra.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoints.open_companion(found, "none.safetensors")


def test_manifests_are_read_along(place: Path) -> None:
    (place / layout.MANIFEST).write_text("{}")
    with pytest.raises(Exception, match="not a coldctl manifest"):
        opened(place, {"a": A})
