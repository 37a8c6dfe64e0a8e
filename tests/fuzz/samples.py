"""Sound documents of every kind that strangers may send: what fuzzing starts from. Nothing here is a mock of our own code."""

import base64
import hashlib
import io
import json
from functools import cache
from typing import Any

import numpy as np

from coldctl.artifacts import signatures
from coldctl.checkpoints import writer
from coldctl.common.digests import digest_of

BODY: dict[str, tuple[int, ...]] = {
    "embeddings.word_embeddings.weight": (6, 4),
    "encoder.layer.0.attention.self.query.weight": (4, 4),
    "pooler.dense.bias": (4,),
}
CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "vocab_size": 6,
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": True,
    "alpha_pattern": {"layer.*.query": 3, "query": 1},
}


def tensors_file(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> bytes:
    layouts = writer.file_order([writer.Layout(name, dtype, shape) for name, shape in shapes.items()])
    return writer.header(layouts) + bytes(sum(item.nbytes for item in layouts))


def prefixed(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"bert.{name}": shape for name, shape in shapes.items()} | {"classifier.weight": (2, 4)}


def spelt(document: Any) -> bytes:
    return json.dumps(document).encode()


def record(**more: Any) -> dict[str, Any]:
    return {
        "name": "one",
        "dataset": "reviews",
        "num_train": 10,
        "source": "org/reviews",
        "license": "mit",
        "body_digest": "sha256:0",
        "training": {"epochs": 2, "learning_rate": 1e-5},
        "environment": {"device": "cpu", "training_seconds": 2.5, "threads": 2},
        "weight": 0.5,
        "status": "fused",
        "reason": None,
        "verified": True,
        "age": 0,
        "signer": "ann",
        "signer_key": "sha256:1",
        "update_norm": 1.5,
        "cosine_to_mean": 0.5,
        "update_share": {"embeddings": 0.5},
        "notes": ["has no pooler"],
        **more,
    }


def manifest_document() -> dict[str, Any]:
    fused = {
        "kind": "fused",
        "name": "iteration-001",
        "iteration": 1,
        "created": "2026-01-01T00:00:00Z",
        "body_digest": "sha256:2",
    }
    return {
        "schema": 1,
        **fused,
        "encoding": "full",
        "coldctl_version": "1",
        "identity": "sha256:3",
        "files": {"model.safetensors": "sha256:4"},
        "base": {"name": "base", "body_digest": "sha256:5"},
        "outside_body": {"model.safetensors": "sha256:6"},
        "license": "mit",
        "config": {"method": "ties", "scale": "auto", "effective_scale": 1.5, "density": 0.2},
        "environment": {"python": "3.11"},
        "metrics": {"validation": {"accuracy": 71.0}},
        "dataset": {"name": "reviews", "fingerprint": "sha256:7", "num_train": 10, "labels": ["a", "b"]},
        "contributions": [
            record(),
            record(name="two", status="rejected", reason="outlier", weight=0.0, license="cc-by-nc-4.0"),
        ],
        "ancestors": [
            {"kind": "pretrained", "name": "org/base", "body_digest": "sha256:5"},
            {**fused, "contributions": [record()]},
        ],
    }


def signed(document: dict[str, Any]) -> bytes:
    document.pop("manifest_digest", None)
    document["manifest_digest"] = digest_of(document)
    return spelt(document)


def run_document() -> bytes:
    entry = {"number": 1, "promoted": True, "body_digest": "sha256:0", "reason": None}
    return spelt(
        {
            "schema": 1,
            "base": "./base",
            "revision": None,
            "config_digest": "sha256:1",
            "sample": 0,
            "seed": 0,
            "gate": False,
            "target": 2,
            "iterations": [entry],
        }
    )


def results_document() -> bytes:
    gain = {
        "model": "fused",
        "protocol": "linear-probe",
        "mean": 70.0,
        "baseline_mean": 69.0,
        "gain": 1.0,
        "gain_interval": [-1.0, 2.0],
        "verdict": "indistinguishable",
    }
    seed = {"seed": 0, "score": 70.0, "baseline_score": 69.0, "cell": "ab", "baseline_cell": "cd"}
    return spelt(
        {
            "schema": 1,
            "baseline": {"name": "base", "body_digest": f"sha256:{0:064x}"},
            "models": [{"name": "fused", "body_digest": f"sha256:{1:064x}", "run": None, "iteration": 1}],
            "fingerprints": {"reviews": f"sha256:{2:064x}"},
            "results": [
                {
                    **gain,
                    "dataset": "reviews",
                    "role": "seen",
                    "metric": "accuracy",
                    "num_test": 10,
                    "seeds": [seed],
                    "std": None,
                }
            ],
            "averages": [{**gain, "group": "all"}, {**gain, "group": "seen"}],
            "overlaps": [{"test_of": "reviews", "train_of": "reviews", "examples": 1, "num_test": 10}],
        }
    )


LABELS: tuple[tuple[Any, ...], ...] = (("a", "b"), (0, 1), (0.5, 2), (["a"], []))


def rows(labels: tuple[Any, ...], **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": labels[number % len(labels)], **more} for number in range(12)]


def lines(found: list[dict[str, Any]]) -> bytes:
    return b"\n".join(map(spelt, found)) + b"\n"


def tables(delimiter: str) -> list[bytes]:
    texts = ('"a, ""b""\nc"' if delimiter == "," else '"a, ', "plain", "", "é")
    body = "".join(f"{texts[number % 4]} {number}{delimiter}{'ab'[number % 2]}\r\n" for number in range(12))
    return [f"text{delimiter}label\r\n{body}".encode(), b"\xef\xbb\xbf" + f"text{delimiter}label\n".encode()]


SUITE = """[run]
base = "org/base"
sample = 2
[finetune]
epochs = 2
learning_rate = 5e-5
class_weights = "balanced"
[fuse]
method = "ties"
density = 0.2
weights = "equal"
trusted_keys = "keys"
[evaluate]
protocol = ["linear-probe", "few-shot"]
seeds = 3
[publish]
license = "mit"
[[dataset]]
name = "tweets"
path = "tweets"
role = "seen"
contributors = 3
text = ["title", "body"]
metric = "macro_f1"
license = "mit"
[[dataset]]
name = "nyt"
path = "hf:org/nyt:config"
role = "unseen"
train = "train"
test = ["test", "more"]
"""


def tokenizer() -> bytes:
    vocab = {"[PAD]": 0, "[UNK]": 1, "a": 2, "##b": 3}
    added = [{"id": 0, "content": "[PAD]", "special": True}, {"id": 4, "content": "<x>", "special": False}]
    return spelt(
        {"version": "1.0", "added_tokens": added, "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocab}}
    )


def merging_tokenizer() -> bytes:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    return spelt({"version": "1.0", "added_tokens": [], "model": model})


@cache
def signature() -> tuple[bytes, Any]:
    """A signature over CONFIG by a key of our own, and that key."""
    digest = hashlib.sha256(spelt(CONFIG))
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "it", "digest": {"sha256": hashlib.sha256(digest.digest()).hexdigest()}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"name": "config.json", "algorithm": "sha256", "digest": digest.hexdigest()}],
        },
    }
    return bundle_of(spelt(statement)), signatures.named("ann", signing_key().public_key())


@cache
def signing_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.derive_private_key(7, ec.SECP256R1())


def bundle_of(payload: bytes) -> bytes:
    """A Sigstore bundle with this payload, signed by our own key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = signatures.named("ann", signing_key().public_key())
    kind = b"application/vnd.in-toto+json"
    signed_part = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    made = signing_key().sign(signed_part, ec.ECDSA(hashes.SHA256()))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind.decode(),
        "signatures": [{"sig": base64.b64encode(made).decode(), "keyid": ""}],
    }
    return spelt(
        {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "dsseEnvelope": envelope,
            "verificationMaterial": {"publicKey": {"hint": key.hint}, "tlogEntries": []},
        }
    )


def pickled(*, old: bool) -> bytes:
    import torch

    state = {f"bert.{name}": torch.zeros(shape) for name, shape in BODY.items()}
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def delta_manifest(encoding: str) -> bytes:
    return signed({**manifest_document(), "kind": "contribution", "encoding": encoding, "ancestors": []})


DELTA_INT8: dict[str, tuple[int, ...]] = {
    **BODY,
    **{f"{name}.scale": (shape[0] if len(shape) > 1 else 1,) for name, shape in BODY.items()},
}


def delta_int8() -> bytes:
    wide = [
        writer.Layout(name, "F32" if name.endswith(".scale") else "I8", shape) for name, shape in DELTA_INT8.items()
    ]
    ordered = writer.file_order(wide)
    return writer.header(ordered) + bytes(np.zeros(sum(item.nbytes for item in ordered), np.uint8))


LORA_NAME = "base_model.model.bert.encoder.layer.0.attention.self.query"
LORA: dict[str, tuple[int, ...]] = {
    f"{LORA_NAME}.lora_A.weight": (2, 4),
    f"{LORA_NAME}.lora_B.weight": (4, 2),
    "classifier.bias": (2,),
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HALVES: tuple[dict[str, tuple[int, ...]], ...] = ({"bert.a": (2, 2)}, {"bert.b": (3,)})
