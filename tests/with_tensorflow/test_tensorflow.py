"""What the card promises to users of TensorFlow and of older tokenizers, in an environment of transformers 4.

`make test-tensorflow` runs these tests: they publish here, and run the card's blocks and version 4's own tokenizer classes with
the interpreter that TENSORFLOW_PYTHON names. Without it they are skipped.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Ran
from helpers import tiny

PYTHON = os.environ.get("TENSORFLOW_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="TENSORFLOW_PYTHON is not set: see make test-tensorflow")
ROOT = Path(__file__).parents[2]
MINILM = ROOT / "assets" / "demo" / "base"
QUIET = {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "-1"}
SENTENCES = ("The film was a joy.", "Numbers like 3,141.59, and Quaxolotlish words: déjà vu!", " two  spaces")
KINDS = {
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
}

_TOKENS = """
import json, sys, transformers
folder, name, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for kind in (name, name + "Fast", "AutoTokenizer"):
    print(json.dumps(getattr(transformers, kind).from_pretrained(folder)(texts)["input_ids"]))
"""


def block(card: Path, marker: str) -> str:
    """The card's Python block that has `marker` in it, to be run as it stands."""
    found = re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)
    return str(next(text for text in found if marker in text))


def features(folder: Path, marker: str, interpreter: str, target: Path) -> Any:
    """What the block computes, run where a reader of the card would: beside the published directory."""
    saving = f"""
import numpy
features = features.float() if hasattr(features, "float") else features  # NumPy knows no bfloat16 of torch's
numpy.save({str(target)!r}, numpy.asarray(features, dtype='float32'))
"""
    code = block(folder / "README.md", marker) + saving
    ran = subprocess.run(
        [interpreter, "-c", code],
        cwd=folder.parent,
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return np.load(target)


def difference(folder: Path, scratch: Path) -> float:
    """The largest difference between TensorFlow's and PyTorch's features of real tokens."""
    theirs = features(folder, "TF", PYTHON, scratch / "theirs.npy")
    ours = features(folder, "import torch\nfrom transformers", sys.executable, scratch / "ours.npy")
    from transformers import AutoTokenizer

    mask = AutoTokenizer.from_pretrained(folder)(["A text to encode.", "Another one."], padding=True)["attention_mask"]
    assert theirs.shape == ours.shape
    worst = float(np.abs((theirs - ours) * np.array(mask)[..., None]).max())
    print(f"{folder.name}: {worst:.2g}")  # noqa: T201  (`make test-tensorflow` shows it)
    return worst


def published(coldctl: Callable[..., Ran], source: Path, target: Path, *options: object) -> Path:
    ran = coldctl("publish", source, "--to", target, "--license", "mit", *options)
    assert ran.code == 0, ran.stderr
    return target


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "mpnet", "xlm-roberta", "albert"]
)
def test_tensorflow_s_features_are_pytorch_s(kind: str, tmp_path: Path, coldctl: Callable[..., Ran]) -> None:
    base = tiny.make_base(kind, tmp_path / "base")
    folder = published(coldctl, base, tmp_path / kind)
    assert difference(folder, tmp_path) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_sharded_and_rounded_weights(kind: str, tmp_path: Path, coldctl: Callable[..., Ran]) -> None:
    base = tiny.make_base(kind, tmp_path / "base")
    assert difference(published(coldctl, base, tmp_path / "sharded", "--max-shard-size", "20KB"), tmp_path) < 1e-5
    assert difference(published(coldctl, base, tmp_path / "rounded", "--dtype", "bfloat16"), tmp_path) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_older_tokenizers_give_the_same_tokens(kind: str, tmp_path: Path, coldctl: Callable[..., Ran]) -> None:
    from transformers import AutoModel, AutoTokenizer

    tiny.make_base(kind, tmp_path / "base")
    new = tmp_path / "saved-by-version-5"
    AutoModel.from_pretrained(tmp_path / "base").save_pretrained(new)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(new)
    wanted = AutoTokenizer.from_pretrained(new)(list(SENTENCES))["input_ids"]
    folder = published(coldctl, new, tmp_path / "published")
    assert AutoTokenizer.from_pretrained(folder)(list(SENTENCES))["input_ids"] == wanted
    command = [PYTHON, "-c", _TOKENS, str(folder), KINDS[kind], json.dumps(SENTENCES)]
    ran = subprocess.run(command, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for line in ran.stdout.strip().splitlines():
        assert json.loads(line) == wanted


@pytest.mark.skipif(not MINILM.is_dir(), reason="make assets")
def test_a_real_encoder_as_bert_and_as_roberta(tmp_path: Path, coldctl: Callable[..., Ran]) -> None:
    import torch
    from transformers import AutoModel, RobertaConfig, RobertaModel

    folder = published(coldctl, MINILM, tmp_path / "minilm")
    assert difference(folder, tmp_path) < 1e-5
    bert = AutoModel.from_pretrained(MINILM)
    known = bert.config.to_dict()
    kept = {
        key: known[key]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    }
    config = RobertaConfig(**kept, pad_token_id=0, max_position_embeddings=513, type_vocab_size=1, layer_norm_eps=1e-12)
    roberta = RobertaModel(config)
    state = {name: value for name, value in bert.state_dict().items() if name in roberta.state_dict()}
    positions = state["embeddings.position_embeddings.weight"]
    state["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros(1, positions.shape[1]), positions])
    state["embeddings.token_type_embeddings.weight"] = state["embeddings.token_type_embeddings.weight"][:1]
    state = {name: value for name, value in state.items() if not name.endswith("_ids")}
    lacking = roberta.load_state_dict(state, strict=False)
    assert not [name for name in lacking.missing_keys if not name.endswith("_ids")]
    roberta.save_pretrained(tmp_path / "converted")
    for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / "converted" / name).write_bytes((MINILM / name).read_bytes())
    folder = published(coldctl, tmp_path / "converted", tmp_path / "minilm-roberta")
    assert difference(folder, tmp_path) < 1e-5
