"""Publishing through the command line: what a stranger finds, loads, trusts, and what must never reach them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

import coldctl as coldctl_package
from coldctl.artifacts.manifest import digest_of_file
from coldctl.common.digests import digest_of
from coldctl.common.errors import CheckpointError
from coldctl.evaluation.markdown import published as place_among_published
from coldctl.publishing.load_check import prove_loading
from conftest import FAST, Ran, suite_text
from helpers import tiny

Run = Callable[..., Ran]

# Runs every Python block of a card, each with a clean slate, and says which one failed.
_RUNNER = """
import pathlib, re, sys
for block in re.findall(r"```python\\n(.*?)```", pathlib.Path(sys.argv[1]).read_text(), flags=re.DOTALL):
    if "TF" not in block:
        exec(compile(block, block, "exec"), {"__name__": "__main__"})
        print("ran", len(block))
"""


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, base: Path, contributions: Path) -> Path:
    """Three contributions fused, one of several iterations, and one that was refused."""
    from conftest import run_coldctl

    folder = tmp_path_factory.mktemp("publish")
    parts = Path(shutil.copytree(contributions, folder / "contributions"))
    tiny.perturb(parts / "one", parts / "broken", seed=3)
    weights = parts / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = run_coldctl("fuse", parts, "--base", base, "--output", folder / "fused", "--screen", "reject")
    assert ran.code == 0, ran.stderr
    return folder / "fused"


@pytest.fixture(scope="module")
def evaluation(fused: Path, base: Path, suite: Path) -> Path:
    from conftest import run_coldctl

    folder = fused.parent / "evaluation"
    ran = run_coldctl("evaluate", fused, "--baseline", base, "--suite", suite, "--output", folder, "--jobs", 1)
    assert ran.code == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key, and beside it the public one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    path = tmp_path_factory.mktemp("keys") / "key.pem"
    private = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def published(fused: Path, evaluation: Path, key: Path) -> Path:
    """Published with all there is; tests only read it."""
    from conftest import run_coldctl

    target = fused.parent / "published"
    ran = run_coldctl(
        "publish", fused, "--to", target, "--evaluation", evaluation, "--license", "mit", "--name", "Recycled",
        "--base-model", "org/tiny", "--onnx", "--sign-key", key,
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    return target


def front_matter(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    return document


def test_every_block_of_the_card_runs(published: Path, tmp_path: Path) -> None:
    card = (published / "README.md").read_text()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    runner = [sys.executable, "-c", _RUNNER, str(published / "README.md")]
    ran = subprocess.run(runner, cwd=published.parent, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("ran") == 4  # PyTorch, scikit-learn, sentence-transformers, ONNX
    tiny.make_dataset(tmp_path / "my-data")
    shutil.copytree(published, tmp_path / "published")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", card, flags=re.DOTALL) for line in block.splitlines()]
    assert commands == ["coldctl finetune my-data --base published --output my-model"]
    program = [sys.executable, "-m", "coldctl", *commands[0].split()[1:], *map(str, FAST)]
    ran = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "my-model" / "coldctl.json").is_file()


def test_the_embeddings_are_the_mean_of_the_features(published: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    texts = ["a short text", "and a longer one that pads the other"]
    found = SentenceTransformer(str(published)).encode(texts)
    inputs = AutoTokenizer.from_pretrained(published)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        features = AutoModel.from_pretrained(published)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    assert np.allclose(found, ((features * mask).sum(1) / mask.sum(1)).numpy(), atol=1e-5)


def test_the_card_says_where_every_number_comes_from(published: Path, evaluation: Path) -> None:
    head = front_matter(published)
    assert head["license"] == "mit"
    assert head["base_model"] == "org/tiny"
    assert head["base_model_relation"] == "merge"
    assert set(head["datasets"]) == {"data-one", "data-two", "data-three"}
    assert head["metrics"] == ["accuracy"]
    results = json.loads((evaluation / "results.json").read_text())
    entries = head["model-index"][0]["results"]
    assert head["model-index"][0]["name"] == "Recycled"
    assert len(entries) == len(results["results"]) == 3
    for entry, wanted in zip(entries, results["results"], strict=True):
        metric = entry["metrics"][0]
        assert entry["dataset"]["name"] == wanted["dataset"]
        assert metric["value"] == pytest.approx(wanted["mean"], abs=0.01)
        assert metric["args"]["baseline_value"] == pytest.approx(wanted["baseline_mean"], abs=0.01)
        assert metric["args"]["gain_interval_95"] == pytest.approx(wanted["gain_interval"], abs=0.01)
        assert metric["args"]["body_digest"] == results["models"][0]["body_digest"]
    card = (published / "README.md").read_text()
    assert "3 of 4 contributions" in card
    assert "The tables and the picture call this model fused." in card
    assert "epochs: 1, batch: 16" in card
    assert re.search(r"contribution1x\d -\. \"refused#58; .*\" \.-> model1|-\. \"refused: .*\" \.->", card)
    assert "do not say under which licence they are given" in card
    for name in ("results.json", "report.md", "report.html", "gain.png"):
        assert (published / name).is_file()


def test_lineage_needs_the_published_directory_alone(published: Path, tmp_path: Path, coldctl: Run) -> None:
    alone = Path(shutil.copytree(published, tmp_path / "alone"))
    ran = coldctl("lineage", alone, "--json")
    generations = ran.json["lineage"]
    assert [generation["kind"] for generation in generations] == ["pretrained", "published"]
    statuses = {item["name"]: item["status"] for item in generations[-1]["contributions"]}
    assert statuses == {"data-one": "fused", "data-two": "fused", "data-three": "fused", "broken": "rejected"}
    tree = coldctl("lineage", alone).stderr
    assert "refused:" in tree
    assert "data-one on" not in tree  # a dataset is named where it is called otherwise


def test_the_card_tells_how_it_was_fused(base: Path, contributions: Path, tmp_path: Path, coldctl: Run) -> None:
    parts = Path(shutil.copytree(contributions, tmp_path / "parts"))
    manifest = json.loads((parts / "one" / "coldctl.json").read_text())
    manifest["dataset"]["source"] = "org/data:config"
    manifest.pop("manifest_digest")
    (parts / "one" / "coldctl.json").write_text(json.dumps({**manifest, "manifest_digest": digest_of(manifest)}))
    recipe = ("--method", "ties", "--scale", "auto", "--density", 0.4)
    assert coldctl("fuse", parts, "--base", base, "--output", tmp_path / "fused", *recipe).code == 0
    for options in ((), ("--dtype", "bfloat16")):
        target = tmp_path / f"published-{len(options)}"
        ran = coldctl("publish", tmp_path / "fused", "--to", target, "--license", "mit", *options)
        assert ran.code == 0, ran.stderr
        card = (target / "README.md").read_text()
        assert re.search(r"3 of 3 contributions, fused by `ties` with λ = auto \([0-9.]+\), density: 0\.4\.", card)
        assert re.search(r"Fused with python .*, numpy ", card)  # its own versions, not those of the publication
        assert set(front_matter(target)["datasets"]) == {"org/data", "data-two", "data-three"}
    below = tmp_path / "fused"
    for number in (2, 3, 4):
        gifts = [tiny.perturb(base, tmp_path / f"{number}-{seed}", seed=seed) for seed in (1, 2)]
        fuse = ("fuse", *gifts, "--base", below, "--output", tmp_path / f"fused-{number}", "--scale", "1.5*auto")
        assert coldctl(*fuse).code == 0
        below = tmp_path / f"fused-{number}"
    assert coldctl("publish", below, "--to", tmp_path / "p", "--license", "mit").code == 0
    card = (tmp_path / "p" / "README.md").read_text()
    assert card.count("fused by `mean` with λ = 1.5\\*auto (") == 3
    # Of many iterations the first ones are folded up, in HTML.
    assert re.search(
        r"<summary>Iteration 1: 3 of 3 contributions, fused by ties with λ = auto \([0-9.]+\), density", card
    )


def test_a_model_of_unknown_origin_has_a_card_without_guesses(base: Path, tmp_path: Path, coldctl: Run) -> None:
    assert coldctl("publish", base, "--to", tmp_path / "p", "--license", "mit").code == 0
    assert "A text encoder, made with" in (tmp_path / "p" / "README.md").read_text()


def test_a_place_among_the_published_models(fused: Path, base: Path, suite: Path, tmp_path: Path, coldctl: Run) -> None:
    """The base is roberta-base if the publisher says so, whatever its directory was called."""
    text = re.sub(r'name = "red"', 'name = "cola"', suite.read_text().split('[[dataset]]\nname = "green"')[0])
    (suite.parent / "ranked.toml").write_text(text)
    ran = coldctl(
        "evaluate", fused, "--baseline", base, "--suite", suite.parent / "ranked.toml", "--output", tmp_path / "e",
        "--protocol", "finetune", "--jobs", 1,
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    publish = ("publish", fused, "--license", "mit", "--evaluation", tmp_path / "e", "--to")
    assert coldctl(*publish, tmp_path / "named", "--base-model", "FacebookAI/roberta-base").code == 0
    card = (tmp_path / "named" / "README.md").read_text()
    assert re.search(
        r"published models of the \[model-recycling leaderboard\]\(https://.*\) it would stand at rank", card
    )
    assert f"against {base.name} (its pretrained model, `FacebookAI/roberta-base`)" in card
    assert "its pretrained model" in card.split("## How it works")[0]
    assert "call this model" not in card  # tables and card have one name for it
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    name = next(item["model"] for item in results["results"] if item["model"] != results["baseline"]["name"])
    assert "published models" in place_among_published(results, name, "roberta-base")[0]
    for entry in results["results"]:
        entry["dataset"] = "no-dataset-of-theirs"
    assert place_among_published(results, name, "roberta-base") == []
    assert coldctl(*publish, tmp_path / "unnamed").code == 0
    assert "leaderboard" not in (tmp_path / "unnamed" / "README.md").read_text()


def test_what_a_person_wrote_into_the_card_is_kept(
    published: Path, fused: Path, evaluation: Path, tmp_path: Path, coldctl: Run
) -> None:
    target = Path(shutil.copytree(published, tmp_path / "published"))
    text = (target / "README.md").read_text()
    before = text
    for name, words in (
        ("introduction", "![ours](banner.png)"), ("how-it-works", "Hello from us."), ("lineage", "Our own remark."),
        ("citation", "## Contact\n\nAsk *Ann*.\n\n```sh\necho ours\n\necho too\n```"),
    ):  # fmt: skip
        begin = f"<!-- coldctl:begin {name} -->\n"
        before = before.replace(begin, f"{words}\n\n{begin}", 1)
    before = before.replace("language: en\n", "language: en\nwidget:\n- text: ours\n", 1)
    before = before.replace("tags:\n", "tags:\n- our-tag\n", 1) + "\nThe last word.\n"
    (target / "README.md").write_text(before)
    ran = coldctl("publish", fused, "--to", target, "--license", "apache-2.0", "--name", "Recycled", "--overwrite")
    assert ran.code == 0, ran.stderr
    after = (target / "README.md").read_text()
    head = front_matter(target)
    assert head["widget"] == [{"text": "ours"}]
    assert "our-tag" in head["tags"]
    assert head["license"] == "apache-2.0"
    places = ["![ours](banner.png)", "# Recycled\n",
              "Hello from us.", "## How it works", "Our own remark.", "## Lineage", "## Contact", "Ask *Ann*.",
              "```sh\necho ours\n\necho too\n```", "## Citation", "The last word."]  # fmt: skip
    positions = [after.index(words) for words in places]
    assert positions == sorted(positions)
    assert all(after.count(words) == 1 for words in places)
    assert "### Linear-probe" not in after  # this time without an evaluation
    assert "published without an evaluation" in after
    again = coldctl(
        "publish", fused, "--to", target, "--license", "mit", "--evaluation", evaluation, "--name", "Recycled",
        "--base-model", "org/tiny", "--overwrite",
    )  # fmt: skip
    assert again.code == 0, again.stderr
    third = (target / "README.md").read_text()
    assert "published without an evaluation" not in third
    assert all(third.count(words) == 1 for words in places)
    # What was published here and written into is published elsewhere: with these words, and with what is known of it.
    ran = coldctl("publish", target, "--to", tmp_path / "elsewhere")
    assert ran.code == 0, ran.stderr
    fourth = (tmp_path / "elsewhere" / "README.md").read_text()
    assert all(fourth.count(words) == 1 for words in places)
    assert "fused by `mean` with λ = 1" in fourth
    head = front_matter(tmp_path / "elsewhere")
    assert (head["widget"], head["license"], head["base_model"]) == ([{"text": "ours"}], "mit", "org/tiny")
    (tmp_path / "elsewhere" / "README.md").write_text(fourth.replace("\n![ours]", "\nAbove all.\n\n![ours]", 1))
    ran = coldctl("publish", target, "--to", tmp_path / "elsewhere", "--name", "Other", "--overwrite")
    assert ran.code == 0, ran.stderr
    fifth = (tmp_path / "elsewhere" / "README.md").read_text()
    assert fifth.index("Above all.") < fifth.index("# Other\n")
    assert all(fifth.count(words) == 1 for words in places if words != "# Recycled\n")
    assert coldctl("publish", target, "--to", tmp_path / "elsewhere", "--overwrite").code == 0
    assert "complete already" in coldctl("publish", target, "--to", tmp_path / "elsewhere").stderr


@pytest.mark.parametrize(
    "standing", ["Only words.\n", "---\nlicense: [mit\n---\n\nOnly words.\n", "---\ntags: mine\n---\n\nOnly words.\n"]
)
def test_a_card_of_any_form_is_kept(standing: str, published: Path, fused: Path, tmp_path: Path, coldctl: Run) -> None:
    shutil.copytree(published, tmp_path / "p")
    (tmp_path / "p" / "README.md").write_text(standing)
    ran = coldctl("publish", fused, "--to", tmp_path / "p", "--license", "mit", "--overwrite")
    assert ran.code == 0, ran.stderr
    card = (tmp_path / "p" / "README.md").read_text()
    assert card.count("Only words.") == 1
    assert front_matter(tmp_path / "p")["license"] == "mit"
    assert ("mine" in front_matter(tmp_path / "p")["tags"]) == ("mine" in standing)


@pytest.mark.parametrize(
    ("marker", "instead"),
    [
        ("<!-- coldctl:end lineage -->", ""),
        ("<!-- coldctl:begin lineage -->", ""),
        ("<!-- coldctl:begin results -->", "<!-- coldctl:begin lineage -->"),
        ("<!-- coldctl:end citation -->", ""),
        ("# Recycled", "<!-- coldctl:begin introduction -->"),
    ],
)
def test_publish_refuses_unpaired_card_markers(
    marker: str, instead: str, published: Path, fused: Path, tmp_path: Path, coldctl: Run
) -> None:
    target = Path(shutil.copytree(published, tmp_path / "p"))
    card = (target / "README.md").read_text()
    assert f"{marker}\n" in card
    (target / "README.md").write_text(card.replace(f"{marker}\n", f"{instead}\n", 1))
    ran = coldctl("publish", fused, "--to", target, "--license", "mit", "--overwrite")
    assert ran.code == 2
    assert len(ran.stderr.splitlines()) == 1
    assert re.search(r"p/README\.md: the marker <!-- coldctl:(begin|end) [\w-]+ --> has no partner", ran.stderr)
    assert (target / "README.md").read_text() == card.replace(f"{marker}\n", f"{instead}\n", 1)


def test_publish_keeps_a_whole_card_without_markers(published: Path, fused: Path, tmp_path: Path, coldctl: Run) -> None:
    """As coldctl wrote it before there were markers: nothing tells which of it a person wrote."""
    target = Path(shutil.copytree(published, tmp_path / "p"))
    bare = re.sub(r"<!-- coldctl:.* -->\n", "", (target / "README.md").read_text())
    (target / "README.md").write_text(bare.replace("## Lineage\n", "Our own remark.\n\n## Lineage\n", 1))
    publish = ("publish", fused, "--to", target, "--license", "mit", "--overwrite")
    ran = coldctl(*publish)
    assert ran.code == 0, ran.stderr
    assert "p/README.md has no coldctl markers, so its whole text is kept below the generated blocks" in ran.stderr
    card = (target / "README.md").read_text()
    below = card.partition("<!-- coldctl:end citation -->\n")[2]
    assert below.count("# Recycled\n") == below.count("Our own remark.") == 1
    ran = coldctl(*publish, "--name", "other")
    assert ran.code == 0, ran.stderr
    assert "markers" not in ran.stderr
    assert (target / "README.md").read_text().endswith(below)


def test_a_card_says_what_was_measured(fused: Path, evaluation: Path, tmp_path: Path, coldctl: Run) -> None:
    """Another baseline than the pretrained model, examples that training splits share, weights rounded since."""
    other = Path(shutil.copytree(evaluation, tmp_path / "evaluation"))
    results = json.loads((other / "results.json").read_text())
    results["baseline"] |= {"name": "rival", "body_digest": f"sha256:{'0' * 64}"}
    results["overlaps"] = [{"test_of": "red", "train_of": "green", "examples": 3, "num_test": 24}]
    (other / "results.json").write_text(json.dumps(results))
    document = json.loads((other / "coldctl.json").read_text())
    document["files"]["results.json"] = digest_of_file(other / "results.json")
    document["manifest_digest"] = digest_of({key: value for key, value in document.items() if key != "manifest_digest"})
    (other / "coldctl.json").write_text(json.dumps(document))
    ran = coldctl(
        "publish", fused, "--to", tmp_path / "p", "--license", "mit", "--evaluation", other, "--dtype", "bfloat16",
        "--base-model", "org/tiny",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    card = (tmp_path / "p" / "README.md").read_text()
    assert "gains are points against rival with a 95 %" in card
    assert "(its pretrained model" not in card
    assert "Measured in float32, before its weights were rounded for this repository." in card
    assert "- 3 of the 24 test examples of red also stand in the training split of green" in card


def test_a_long_lineage_is_counted(fused: Path, tmp_path: Path, coldctl: Run) -> None:
    crowded = Path(shutil.copytree(fused, tmp_path / "crowded"))
    document = json.loads((crowded / "coldctl.json").read_text())
    refused = [item for item in document["contributions"] if item["status"] == "rejected"]
    one = next(item for item in document["contributions"] if item["status"] == "fused")
    document["contributions"] = [*refused, *({**one, "name": f"c{number}"} for number in range(160))]
    document["ancestors"][0]["name"] = "org/pretrained"
    document["manifest_digest"] = digest_of({key: value for key, value in document.items() if key != "manifest_digest"})
    (crowded / "coldctl.json").write_text(json.dumps(document))
    ran = coldctl("publish", crowded, "--to", tmp_path / "p", "--license", "mit")
    assert ran.code == 0, ran.stderr
    assert '    model0 -- "160 contributions, 1 refused" --> model1' in (tmp_path / "p" / "README.md").read_text()
    assert front_matter(tmp_path / "p")["base_model"] == "org/pretrained"


def test_tensors_of_unlike_widths_and_a_config_that_says_little(base: Path, tmp_path: Path, coldctl: Run) -> None:
    """The digest goes by name and the file by width; a config may name neither class nor dtype."""
    import torch

    odd = Path(shutil.copytree(base, tmp_path / "odd"))
    tensors, metadata = tiny.read_tensors(base / "model.safetensors")
    mixed = {
        name: value.double() if number % 3 else value for number, (name, value) in enumerate(sorted(tensors.items()))
    }
    tiny.write_tensors(odd / "model.safetensors", list(mixed.items()), metadata)
    config = json.loads((base / "config.json").read_text())
    for key in ("architectures", "dtype", "torch_dtype"):
        config.pop(key, None)
    (odd / "config.json").write_text(json.dumps(config))
    assert coldctl("publish", odd, "--to", tmp_path / "same", "--license", "mit").code == 0
    ran = coldctl("publish", odd, "--to", tmp_path / "half", "--license", "mit", "--dtype", "float16")
    assert ran.code == 0, ran.stderr
    for name, dtype in (("same", None), ("half", torch.float16)):
        found, _ = tiny.read_tensors(tmp_path / name / "model.safetensors")
        wanted = {
            key: value.to(dtype) if dtype else value for key, value in mixed.items() if not key.startswith("pooler.")
        }
        assert wanted.keys() <= found.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert "architectures" not in written
        assert written.get("dtype") == ("float16" if dtype else None)
        assert coldctl("check", tmp_path / name, "--deep").code == 0


def test_a_signature_covers_every_file(published: Path, key: Path, tmp_path: Path, coldctl: Run) -> None:
    public = key.with_suffix(".pub")
    ran = coldctl("check", published, "--verify-key", public, "--deep")
    assert ran.code == 0, ran.stderr
    for name in ("model.safetensors", "README.md", "results.json", "coldctl.json", "1_Pooling/config.json"):
        copy = Path(shutil.copytree(published, tmp_path / name.replace("/", "-")))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        ran = coldctl("check", copy, "--verify-key", public, "--json")
        assert ran.code == 3, name
        assert any(name in problem for item in ran.json["checked"] for problem in item["problems"]), ran.stdout
    copy = Path(shutil.copytree(published, tmp_path / "more"))
    (copy / "modeling.py").write_text("print('mine')")
    assert "modeling.py was not there" in coldctl("check", copy, "--verify-key", public, "--json").stdout
    (copy / "model.sig").unlink()
    ran = coldctl("check", copy, "--verify-key", public)
    assert ran.code == 3
    assert "not signed" in ran.stderr


def test_a_file_below_the_directory_is_proven_too(published: Path, tmp_path: Path, coldctl: Run) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    (copy / "1_Pooling" / "config.json").write_text("{}")
    ran = coldctl("check", copy, "--deep", "--json")
    assert ran.code == 3
    assert "1_Pooling/config.json was changed" in ran.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(dtype: str, fused: Path, tmp_path: Path, coldctl: Run) -> None:
    import torch
    from safetensors.torch import load_file

    target = tmp_path / "half"
    ran = coldctl("publish", fused, "--to", target, "--license", "mit", "--dtype", dtype, "--json")
    assert ran.code == 0, ran.stderr
    before, after = load_file(fused / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wanted = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert torch.equal(after[name], wanted), name
    assert json.loads((target / "config.json").read_text())["dtype"] == dtype
    assert coldctl("check", target, "--deep").code == 0
    kinds = [generation["kind"] for generation in coldctl("lineage", target, "--json").json["lineage"]]
    assert kinds == ["pretrained", "fused", "published"]
    assert "3 of 4 contributions" in (target / "README.md").read_text()


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 7), ("float16", 10)])
def test_publish_rounds_float64_weights_once(dtype: str, digits: int, base: Path, tmp_path: Path, coldctl: Run) -> None:
    """Just above the middle of two neighbours: by way of float32 it would become the middle, and then the even one."""
    import torch

    wide = Path(shutil.copytree(base, tmp_path / "wide"))
    tensors, metadata = tiny.read_tensors(base / "model.safetensors")
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
    name = next(name for name in doubles if name.endswith("LayerNorm.weight"))
    doubles[name][:] = 1 + 2.0 ** -(digits + 1) + 2.0**-40
    tiny.write_tensors(wide / "model.safetensors", list(doubles.items()), metadata)
    config = json.loads((base / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    ran = coldctl("publish", wide, "--to", tmp_path / "p", "--license", "mit", "--dtype", dtype)
    assert ran.code == 0, ran.stderr
    found, _ = tiny.read_tensors(tmp_path / "p" / "model.safetensors")
    assert found[name].dtype == getattr(torch, dtype)
    assert torch.all(found[name].double() == 1 + 2.0**-digits)


def test_a_value_that_the_dtype_cannot_hold_is_refused(base: Path, tmp_path: Path, coldctl: Run) -> None:
    big = tiny.perturb(base, tmp_path / "big", seed=0, scale=1e7)
    ran = coldctl("publish", big, "--to", tmp_path / "p", "--license", "mit", "--dtype", "float16")
    assert ran.code == 2
    assert "no finite number in F16" in ran.stderr
    assert not (tmp_path / "p").exists()


def test_sharded_weights_load(fused: Path, tmp_path: Path, coldctl: Run) -> None:
    ran = coldctl("publish", fused, "--to", tmp_path / "p", "--license", "mit", "--max-shard-size", "20KB")
    assert ran.code == 0, ran.stderr
    assert len(list((tmp_path / "p").glob("model-*.safetensors"))) > 1
    assert coldctl("check", tmp_path / "p", "--deep").code == 0


def test_nothing_private_leaves(
    base: Path, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run
) -> None:
    home = tmp_path / "zq-home"
    (home / "tmp").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "zq-user-name")
    monkeypatch.setenv("LOGNAME", "zq-user-name")
    monkeypatch.setenv("SOME_API_KEY", "zq-secret-value")
    monkeypatch.setenv("ORDINARY", "zq-ordinary-value")
    place = Path(shutil.copytree(base, home / "models" / "base"))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(
        json.dumps(
            {**config, "_name_or_path": str(place), "made_in": f"{home}/here", "auto_map": {"AutoModel": "zq.Code"}}
        )
    )
    tokenizer = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "name_or_path": str(place), "special_tokens_map_file": f"{home}/x.json"})
    )
    for seed, name in enumerate(("red", "green", "blue")):
        folder = tiny.make_dataset(home / name, seed=seed)
        for file in folder.iterdir():
            file.write_text(file.read_text().replace('"text": "', '"text": "zqexample '))
    suite = home / "suite.toml"
    suite.write_text(suite_text("models/base"))
    made = home / "contributions"
    assert coldctl("finetune", "--suite", suite, "--base", place, "--output", made, "--jobs", 1).code == 0
    tiny.perturb(made / "red", made / "broken", seed=1)
    (made / "broken" / "model.safetensors").write_bytes(b"short")
    assert coldctl("fuse", made, "--base", place, "--output", home / "fused", "--screen", "reject").code == 0
    ran = coldctl(
        "evaluate", home / "fused", "--baseline", place, "--suite", suite, "--output", home / "evaluation", "--jobs", 1
    )
    assert ran.code == 0, ran.stderr
    monkeypatch.chdir(home)
    ran = coldctl(
        "publish", "fused", "--to", "published", "--evaluation", "evaluation", "--license", "mit", "--sign-key", key,
        "--onnx",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    planted = [b"zq-home", b"zq-user-name", b"zq-secret-value", b"zq-ordinary-value", b"zqexample", b"zq.Code"]
    planted += [str(Path(coldctl_package.__file__).parent).encode(), sys.prefix.encode()]  # an exporter's stack traces
    planted += [str(tmp_path).encode(), *([host.encode()] if len(host := socket.gethostname()) > 5 else [])]
    for file in (home / "published").rglob("*"):
        if file.is_file():
            found = [words for words in planted if words in file.read_bytes()]
            assert not found, (file, found)


def test_a_secret_in_a_model_s_own_files_stops_it(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "zq-secret-value")
    model = Path(shutil.copytree(fused, tmp_path / "model"))
    (model / "coldctl.json").unlink()  # else it is noticed first that it was changed
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "comment": "made with zq-secret-value"}))
    ran = coldctl("publish", model, "--to", tmp_path / "p", "--license", "mit")
    assert ran.code == 2
    assert "config.json would tell a secret" in ran.stderr
    assert not (tmp_path / "p").exists()
    (model / "config.json").write_text(json.dumps({**config, "comment": f"see {tmp_path}/notes"}))
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = coldctl("publish", model, "--to", tmp_path / "p", "--license", "mit")
    assert "config.json would tell a directory of this machine" in ran.stderr

    def nobody() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr("getpass.getuser", nobody)  # as in a container: what there is to go by still counts
    monkeypatch.setattr("socket.gethostname", lambda: "zq-host-name")
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    (model / "config.json").write_text(json.dumps({**config, "comment": "made on zq-host-name"}))
    ran = coldctl("publish", model, "--to", tmp_path / "p", "--license", "mit")
    assert "config.json would tell this user's or machine's name" in ran.stderr


@pytest.mark.parametrize("login", ["python", "apache", "roberta", "lineage", "coldctl", "language", "accuracy"])
def test_publish_allows_a_login_that_the_card_uses_as_a_word(
    login: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run, publishable: tuple[Path, Path]
) -> None:
    monkeypatch.setenv("LOGNAME", login)
    model, evaluation = publishable
    ran = coldctl(
        "publish", model, "--to", tmp_path / "p", "--license", "apache-2.0", "--base-model", "FacebookAI/roberta-base",
        "--evaluation", evaluation,
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert re.search(rf"\b{login}\b", "".join(file.read_text() for file in (tmp_path / "p").glob("*.[jm]*[nd]")))


@pytest.fixture(scope="module")
def publishable(tmp_path_factory: pytest.TempPathFactory, suite: Path) -> tuple[Path, Path]:
    """A roberta that was fused, and its evaluation."""
    from conftest import run_coldctl

    folder = tmp_path_factory.mktemp("words")
    below = tiny.make_base("roberta", folder / "roberta-base")
    gifts = [tiny.perturb(below, folder / f"gift-{seed}", seed=seed) for seed in (1, 2)]
    assert run_coldctl("fuse", *gifts, "--base", below, "--output", folder / "fused").code == 0
    measure = ("evaluate", folder / "fused", "--baseline", below, "--suite", suite, "--output", folder / "evaluation")
    ran = run_coldctl(*measure, "--jobs", 1)
    assert ran.code == 0, ran.stderr
    return folder / "fused", folder / "evaluation"


@pytest.mark.parametrize("login", ["python", "zq-user"])
@pytest.mark.parametrize("leak", ["notes", "source", "home", "card", "address", "config"])
def test_publish_finds_a_login_that_others_put_in(
    leak: str, login: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run
) -> None:
    model = Path(shutil.copytree(fused, tmp_path / "model"))
    document = json.loads((model / "coldctl.json").read_text())
    record = document["contributions"][0]
    record |= {
        "notes": {"notes": [f"trained by {login}"]},
        "source": {"source": f"{login}/data"},
        "home": {"source": f"see file:/home/{login}"},
    }.get(leak, {})
    document["manifest_digest"] = digest_of({key: value for key, value in document.items() if key != "manifest_digest"})
    (model / "coldctl.json").write_text(json.dumps(document))
    name = "coldctl.json"
    if leak == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "comment": f"by {login}"}))
        (model / "coldctl.json").unlink()  # else it is noticed first that it was changed
        name = "config.json"
    target = tmp_path / "p"
    publish: tuple[object, ...] = ("publish", model, "--to", target, "--license", "mit", "--overwrite")
    if leak in ("card", "address"):
        assert coldctl(*publish).code == 0
        words = f"Ask {login}" if leak == "card" else f"Mail {login}@example.org"
        (target / "README.md").write_text((target / "README.md").read_text() + f"\n{words}, who made it.\n")
        publish, name = (*publish, "--name", "other"), "README.md"
    monkeypatch.setenv("LOGNAME", login)
    ran = coldctl(*publish)
    assert ran.code == 2
    assert f"{name} would tell this user's or machine's name" in ran.stderr


def test_a_dry_run_lists_and_sends_nothing(fused: Path, tmp_path: Path, coldctl: Run) -> None:
    ran = coldctl("publish", fused, "--to", tmp_path / "p", "--license", "mit", "--dry-run", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["dry_run"]
    assert {"model.safetensors", "README.md", "coldctl.json", "config.json"} <= ran.json["sizes"].keys()
    assert ran.json["sizes"]["model.safetensors"] == (fused / "model.safetensors").stat().st_size
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["report.html", "gain.png"])
def test_an_evaluation_gives_nothing_but_its_own_files(
    name: str, fused: Path, evaluation: Path, tmp_path: Path, coldctl: Run
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine alone")
    strange = Path(shutil.copytree(evaluation, tmp_path / "strange"))
    (strange / name).unlink()
    (strange / name).symlink_to(secret)
    document = json.loads((strange / "coldctl.json").read_text())
    for digest, words in ((None, "does not name"), (digest_of_file(secret), "link to outside")):
        document["files"].pop(name, None)
        document["files"] |= {name: digest} if digest else {}
        document.pop("manifest_digest")
        document["manifest_digest"] = digest_of(document)
        (strange / "coldctl.json").write_text(json.dumps(document))
        ran = coldctl("publish", fused, "--to", tmp_path / "to", "--evaluation", strange, "--license", "mit")
        assert (ran.code, words in ran.stderr) == (2, True), ran.stderr
        assert not (tmp_path / "to").exists()


def test_publishing_to_a_store(fused: Path, evaluation: Path, coldctl: Run) -> None:
    url = "memory://hub/recycled"
    publish = ("publish", fused, "--to", url, "--license", "mit", "--evaluation", evaluation)
    ran = coldctl(*publish)
    assert ran.code == 0, ran.stderr
    assert coldctl("check", url, "--deep").code == 0
    assert len(coldctl("lineage", url, "--json").json["lineage"]) == 2
    assert "complete already" in coldctl(*publish).stderr
    other = coldctl(*publish[:-2])
    assert other.code == 2
    assert "--overwrite" in other.stderr
    store = fsspec.filesystem("memory")
    store.pipe("/hub/recycled/README.md", store.cat("/hub/recycled/README.md") + b"\nOur last word.\n")
    assert coldctl(*publish[:-2], "--overwrite").code == 0
    assert not store.exists("/hub/recycled/results.json")
    assert store.cat("/hub/recycled/README.md").endswith(b"Our last word.\n")
    assert [Path(entry).name for entry in store.ls("/hub", detail=False)] == ["recycled"]
    store.pipe("/hub/theirs/weights.bin", b"mine")
    ran = coldctl("publish", fused, "--to", "memory://hub/theirs", "--license", "mit")
    assert ran.code == 2
    assert "did not write" in ran.stderr


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A store whose connection breaks after so many files."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    left = 0

    def cp_file(self, *arguments: Any, **options: Any) -> None:
        self._count()
        super().cp_file(*arguments, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def put_file(self, *arguments: Any, **options: Any) -> None:
        self._count()
        super().put_file(*arguments, **options)

    def _count(self) -> None:
        if Flaky.left == 0:
            raise ConnectionError("the connection was reset")
        Flaky.left -= 1


def test_a_broken_connection_leaves_the_store_as_it_was(fused: Path, coldctl: Run) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.left = 100
    publish = ("publish", fused, "--to", "flaky://hub/model", "--overwrite", "--license")
    assert coldctl(*publish, "mit").code == 0

    def standing() -> dict[str, bytes]:
        store = fsspec.filesystem("flaky")
        return {name: store.cat(name) for name in store.find("/hub/model")}

    before = standing()

    def refuse(*_: object) -> bool:
        raise PermissionError("access denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flaky, "exists", refuse)
        ran = coldctl(*publish, "apache-2.0")
        assert ran.code == 2
        assert "cannot look into flaky:///hub/model: access denied" in ran.stderr
    Flaky.left = 2
    ran = coldctl(*publish, "apache-2.0")
    assert ran.code == 2
    assert "the connection was reset" in ran.stderr
    assert "run the same command again" in ran.stderr
    assert standing() == before
    Flaky.left = 100
    assert coldctl(*publish, "apache-2.0").code == 0
    assert b"license: apache-2.0" in standing()["/hub/model/README.md"]
    assert not [name for name in Flaky.store if "partial" in name]
    Flaky.left = 12  # all is stored, and the store's own copying breaks
    new = ("publish", fused, "--to", "flaky://hub/new", "--license", "mit")
    assert coldctl(*new).code == 2
    Flaky.left = 100
    assert coldctl(*new).code == 0
    assert coldctl("check", "flaky://hub/new", "--deep").code == 0


def test_wrong_input_is_one_line_and_leaves_the_target(
    fused: Path, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run
) -> None:
    target = tmp_path / "p"
    bare = Path(shutil.copytree(fused, tmp_path / "bare"))
    for name in ("tokenizer.json", "vocab.txt"):
        (bare / name).unlink(missing_ok=True)
    (tmp_path / "no-key.pem").write_text("nothing")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((fused, "--to", target), "no licence"),
        ((bare, "--to", target, "--license", "mit"), "has no tokenizer"),
        ((fused, "--to", target, "--license", "mit", "--sign-key", tmp_path / "no-key.pem"), "--sign-key"),
        ((fused, "--to", target, "--license", "mit", "--sign-key", key.with_suffix(".pub")), "--sign-key"),
        ((fused, "--to", target, "--license", "mit", "--private"), "--private"),
        ((fused, "--to", target, "--license", "mit", "--dtype", "int8"), "bfloat16"),
        ((fused, "--to", "hf:org/name", "--license", "mit"), "hf://org/name"),
        ((fused, "--to", "hf://name", "--license", "mit"), "hf://ORG/NAME"),
        ((fused, "--to", "hf://org/bad..name", "--license", "mit"), "no name for the Hub"),
        ((fused, "--to", "nowhere://x/y", "--license", "mit"), "nowhere"),
        ((fused, "--to", fused, "--license", "mit"), "give another --to"),
        ((fused, "--to", tmp_path / "no-key.pem", "--license", "mit"), "give --to a directory"),
        ((fused, "--to", bare, "--license", "mit"), "or another --to"),
        ((fused, "--to", target, "--license", "mit", "--evaluation", fused), "`coldctl evaluate` wrote"),
        ((fused, "--to", target, "--license", "mit", "--evaluation", tmp_path / "x"), "`coldctl evaluate` wrote"),
        ((fused, "--to", target, "--license", "mit", "--name", "a/b"), "--name"),
        ((fused, "--to", target, "--license", "mit", "--base-model", "../x"), "--base-model"),
    ]
    for arguments, words in cases:
        ran = coldctl("publish", *arguments)
        assert ran.code == 2, (arguments, ran.stderr)
        assert words in ran.stderr, (arguments, ran.stderr)
        assert len([line for line in ran.stderr.splitlines() if line.strip()]) == 1, ran.stderr
        assert not target.exists()
    ran = coldctl("check", fused, "--verify-key", tmp_path / "no-key.pem")
    assert (ran.code, "--verify-key" in ran.stderr) == (2, True)
    assert coldctl("check", fused, "--verify-key", key.with_suffix(".pub")).code == 3  # it is not signed
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    ran = coldctl("publish", fused, "--to", target, "--license", "mit", "--sign-key", key)
    assert "coldctl[sign]" in ran.stderr


def test_a_body_that_is_not_the_stated_one_is_not_published(fused: Path, tmp_path: Path, coldctl: Run) -> None:
    model = Path(shutil.copytree(fused, tmp_path / "model"))
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (model / "model.safetensors").write_bytes(data)
    ran = coldctl("publish", model, "--to", tmp_path / "p", "--license", "mit")
    assert ran.code == 2
    assert "model.safetensors was changed after it was written: its body is" in ran.stderr
    assert not (tmp_path / "p").exists()


def test_a_head_of_the_source_is_left_behind(contributions: Path, tmp_path: Path, coldctl: Run) -> None:
    from safetensors import safe_open

    ran = coldctl("publish", contributions / "one", "--to", tmp_path / "p", "--license", "mit")
    assert ran.code == 0, ran.stderr
    with safe_open(tmp_path / "p" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith(("classifier", "bert."))]  # noqa: SIM118
    assert json.loads((tmp_path / "p" / "config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "electra", "mpnet", "modernbert", "deberta-v2", "xlm-roberta"]
)
def test_a_tokenizer_is_completed_and_stays_the_same(kind: str, tmp_path: Path, coldctl: Run) -> None:
    from transformers import AutoModel, AutoTokenizer

    tiny.make_base(kind, tmp_path / "base")
    source = tmp_path / "source"  # as version 5 of transformers saves it: tokenizer.json and tokenizer_config.json
    AutoModel.from_pretrained(tmp_path / "base").save_pretrained(source)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(source)
    texts = ["A plain sentence.", "Numbers like 3,141.59, and a déjà vu!", " two  blanks"]
    wanted = AutoTokenizer.from_pretrained(source)(texts)["input_ids"]
    ran = coldctl("publish", source, "--to", tmp_path / "p", "--license", "mit")
    assert ran.code == 0, ran.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "p")(texts)["input_ids"] == wanted
    model = json.loads((tmp_path / "p" / "tokenizer.json").read_text())["model"]
    files = {"BPE": ("vocab.json", "merges.txt"), "WordPiece": ("vocab.txt",)}.get(model["type"], ())
    for name in files:
        assert (tmp_path / "p" / name).is_file()
    if model["type"] == "BPE":
        assert all(isinstance(merge, str) for merge in model["merges"])
    if model["type"] == "Unigram":
        assert "SentencePiece" in ran.stderr


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("weights", "features differ from the source's"),
        ("tokens", "gives other tokens than the source's"),
        ("lacking", "loaded as AutoModel the published model lacks encoder.layer.1"),
    ],
)
def test_what_does_not_load_as_its_source_is_told(case: str, words: str, base: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(base, tmp_path / "made"))
    prove_loading(base, made, None)
    if case == "weights":
        made = tiny.perturb(base, tmp_path / "other", seed=1)
    elif case == "tokens":
        tokenizer = json.loads((made / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]  # of whole words nothing is known any more
        tokenizer["model"]["vocab"] = {
            key if len(key.strip("#")) < 2 or key[0] == "[" else f"-{key}": number for key, number in vocabulary.items()
        }
        (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        tensors, metadata = tiny.read_tensors(made / "model.safetensors")
        kept = [(name, tensor) for name, tensor in tensors.items() if "layer.1" not in name]
        tiny.write_tensors(made / "model.safetensors", kept, metadata)
    with pytest.raises(CheckpointError, match=words):
        prove_loading(base, made, None)
