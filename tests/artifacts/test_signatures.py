"""Who may contribute: signed contributions, the keys that are trusted, and what a revoked key left behind."""

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import FAST, Ran
from helpers import tiny
from helpers.bodies import digest
from helpers.s3_server import S3

Run = Callable[..., Ran]


def make_key(folder: Path, name: str) -> Path:
    """A private key; its public part lies beside it as `NAME.pub`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    private = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = folder / f"{name}.key"
    path.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("private")
    return {name: make_key(folder, name) for name in ("alice", "bob", "mallory")}


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("trusted")
    for name in ("alice", "bob"):
        shutil.copy(keys[name].with_suffix(".pub"), folder / f"{name}.pem")
    return folder


@pytest.fixture(scope="module")
def signed(
    tmp_path_factory: pytest.TempPathFactory, workshop: Path, base: Path, contributions: Path, keys: dict[str, Path]
) -> Path:
    """The three contributions: two by alice, signed after they were complete, and one by bob."""
    from conftest import run_coldctl

    folder = Path(shutil.copytree(contributions, tmp_path_factory.mktemp("signed") / "contributions"))
    for name, owner in (("one", "alice"), ("two", "alice"), ("three", "bob")):
        data = workshop / f"data-{name}"
        ran = run_coldctl(
            "finetune", data, "--base", base, "--output", folder / name, *FAST, "--jobs", 1, "--sign-key", keys[owner]
        )
        assert ran.code == 0, ran.stderr
        assert "complete already" in ran.stderr
        assert "signed" in ran.stderr
    return folder


def fuse(coldctl: Run, parts: Path, base: Path, output: Path, trusted: Path, *flags: object) -> Ran:
    return coldctl("fuse", parts, "--base", base, "--output", output, "--trusted-keys", trusted, "--json", *flags)


def forge(folder: Path) -> None:
    """Another body, and a manifest that says so: all its digests hold."""
    from coldctl.artifacts import manifest
    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.checkpoints.digests import body_digest, outside_body
    from coldctl.storage.local import LocalFolder

    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    document = manifest.read(folder)
    checkpoint = open_checkpoint(LocalFolder(folder), "x")
    document["body_digest"], document["outside_body"] = body_digest(checkpoint), outside_body(checkpoint)
    (folder / "model.sig").rename(folder.parent / "aside")  # a manifest is written before the signature
    manifest.write(folder, document)
    (folder.parent / "aside").rename(folder / "model.sig")


def test_signed_contributions_are_accepted_and_named(
    signed: Path, contributions: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    ran = fuse(coldctl, signed, base, tmp_path / "fused", trusted)
    assert ran.code == 0, ran.stderr
    signers = {item["name"]: item["signer"] for item in ran.json["contributions"]}
    assert signers == {"data-one": "alice", "data-two": "alice", "data-three": "bob"}
    assert ran.json["config"]["trusted_keys"].keys() == {"alice", "bob"}
    assert {item["signer_key"] for item in ran.json["contributions"]} == set(
        ran.json["config"]["trusted_keys"].values()
    )
    assert all(item["verified"] for item in ran.json["contributions"])
    assert "signed by bob" in ran.stderr
    assert str(trusted) not in (tmp_path / "fused" / "coldctl.json").read_text()
    assert coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "plain").code == 0
    assert digest(tmp_path / "plain") == digest(tmp_path / "fused")
    assert "left alone" in fuse(coldctl, signed, base, tmp_path / "fused", trusted).stderr
    tree = coldctl("lineage", tmp_path / "fused", "--json")
    assert {item["signer"] for item in tree.json["lineage"][-1]["contributions"]} == {"alice", "bob"}
    assert "signed by alice" in tree.stderr
    published = coldctl("publish", tmp_path / "fused", "--to", tmp_path / "published", "--license", "mit")
    assert published.code == 0, published.stderr
    assert "signed by bob" in (tmp_path / "published" / "README.md").read_text()
    (tmp_path / "fuse.toml").write_text(f'[fuse]\ntrusted_keys = "{trusted.name}"\n')
    shutil.copytree(trusted, tmp_path / trusted.name)  # a path in a file is relative to that file
    ran = coldctl("fuse", signed, "--base", base, "--output", tmp_path / "fused", "--config", tmp_path / "fuse.toml")
    assert (ran.code, "left alone" in ran.stderr) == (0, True), ran.stderr


def test_what_no_trusted_key_signed_is_refused_with_its_reason(
    signed: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    from coldctl.artifacts import signatures

    parts = Path(shutil.copytree(signed, tmp_path / "parts"))
    for name in ("unsigned", "stranger", "forged", "added", "flipped", "less"):
        shutil.copytree(signed / "one", parts / name)
    (parts / "unsigned" / "model.sig").unlink()
    signatures.sign(parts / "stranger", keys["mallory"])
    forge(parts / "forged")
    (parts / "added" / "fisher.safetensors").write_bytes(b"mine")
    weights = parts / "flipped" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    (parts / "less" / "tokenizer.json").unlink()
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert ran.code == 2
    assert not (tmp_path / "fused").exists()
    found = "\n".join(ran.json["details"])
    for words in (
        "unsigned: it is not signed",
        "stranger: it is signed by an unknown key: trusted are alice, bob",
        "forged: coldctl.json is not as it was signed",
        ", model.safetensors is not as it was signed",
        "added: fisher.safetensors was not there when it was signed",
        "less: tokenizer.json is missing",
        "flipped: model.safetensors is not as it was signed",
    ):
        assert words in found, (words, found)
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted, "--screen", "reject", "--min-contributions", 3)
    assert ran.code == 0, ran.stderr
    status = {item["name"]: (item["status"], item["signer"]) for item in ran.json["contributions"]}
    assert {name for name, (state, _) in status.items() if state == "fused"} == {"data-one", "data-two", "data-three"}
    assert all(signer is None for state, signer in status.values() if state == "rejected")
    assert len(status) == 9
    fuse(coldctl, signed, base, tmp_path / "clean", trusted)
    assert digest(tmp_path / "clean") == digest(tmp_path / "fused")
    assert fuse(coldctl, parts, base, tmp_path / "strict", trusted, "--strict").code == 3


def test_a_copy_of_a_signed_contribution_counts_once(
    signed: Path, base: Path, trusted: Path, tmp_path: Path, coldctl: Run
) -> None:
    parts = Path(shutil.copytree(signed, tmp_path / "parts"))
    shutil.copytree(signed / "one", parts / "again")
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert ran.code == 2
    assert "is a copy of data-one, which alice signed once" in ran.json["details"][0]


def test_fuse_rejects_a_flipped_bit_in_a_signed_contribution(
    signed: Path, base: Path, trusted: Path, tmp_path: Path, coldctl: Run
) -> None:
    parts = Path(shutil.copytree(signed, tmp_path / "parts"))
    weights = parts / "three" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert ran.code == 2
    assert "three: model.safetensors is not as it was signed" in ran.json["details"][0]
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted, "--screen", "reject")
    assert {item["name"]: item["signer"] for item in ran.json["contributions"]} == {
        "data-one": "alice", "data-two": "alice", "three": None,
    }  # fmt: skip
    again = fuse(coldctl, parts, base, tmp_path / "fused", trusted, "--screen", "reject")
    assert again.code == 0, again.stderr


def test_what_is_no_part_of_the_model_is_signed_as_well(
    signed: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    model, published = tmp_path / "model", tmp_path / "published"
    assert coldctl("fuse", signed, "--base", base, "--output", model).code == 0
    ran = coldctl("publish", model, "--to", published, "--license", "mit", "--sign-key", keys["bob"])
    assert ran.code == 0, ran.stderr
    ran = fuse(coldctl, published, base, tmp_path / "fused", trusted)
    assert ran.code == 0, ran.stderr
    card = published / "README.md"
    card.write_text(card.read_text() + "\n")
    ran = fuse(coldctl, published, base, tmp_path / "again", trusted)
    assert ran.code == 2
    assert "README.md is not as it was signed" in ran.json["details"][0]


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b"9" * 100_000, b'{"dsseEnvelope": {"payloadType": "x"}}', b"\xff\xfe", b'{"dsseEnvelope": []}',
     b" " * (5 << 20)],
    ids=["empty", "nested", "number", "other-type", "no-text", "a-list", "huge"],
)  # fmt: skip
def test_a_strange_signature_file_is_one_reason(
    content: bytes, signed: Path, base: Path, trusted: Path, tmp_path: Path, coldctl: Run
) -> None:
    parts = Path(shutil.copytree(signed, tmp_path / "parts"))
    (parts / "one" / "model.sig").write_bytes(content)
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert ran.code == 2
    assert len(ran.json["details"]) == 1
    assert "model.sig" in ran.json["details"][0]


def test_links_and_signed_nonsense_are_not_as_they_were_signed(
    signed: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    from model_signing import hashing, signing

    parts = Path(shutil.copytree(signed, tmp_path / "parts"))
    picture = parts / "one" / "training.png"
    picture.rename(tmp_path / "elsewhere.png")
    picture.symlink_to(tmp_path / "elsewhere.png")
    assert "training.png is a link to outside" in coldctl("check", parts, "--trusted-keys", trusted, "--json").stdout
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert ran.code == 2
    assert len(ran.json["details"]) == 1
    assert "training.png is " in ran.json["details"][0]
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted, "--screen", "reject")
    assert ran.code == 0, ran.stderr
    assert sorted(item["status"] for item in ran.json["contributions"]) == ["fused", "fused", "rejected"]
    (parts / "two" / "model.sig").unlink()
    (parts / "two" / "coldctl.json").write_text("{}")
    alone = hashing.Config().set_ignored_paths(paths=["model.sig"])
    config = signing.Config().set_hashing_config(alone).use_elliptic_key_signer(private_key=keys["alice"])
    config.sign(parts / "two", parts / "two" / "model.sig")
    ran = fuse(coldctl, parts, base, tmp_path / "other", trusted)
    assert "two/coldctl.json" in str(ran.json["details"])


def test_a_changed_statement_is_no_statement(
    signed: Path, base: Path, trusted: Path, tmp_path: Path, coldctl: Run
) -> None:
    parts = Path(shutil.copytree(signed, tmp_path / "parts"))
    path = parts / "one" / "model.sig"
    bundle = json.loads(path.read_text())
    payload: Any = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["serialization"]["ignore_paths"] = ["model.safetensors"]
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    path.write_text(json.dumps(bundle))
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert "its signature was changed, or is not by alice" in ran.json["details"][0]


def test_what_a_signer_left_out_of_the_signature_is_not_trusted(
    signed: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    from model_signing import hashing, signing

    parts = Path(shutil.copytree(signed, tmp_path / "parts"))
    (parts / "one" / "model.sig").unlink()
    leaving_out = hashing.Config().set_ignored_paths(paths=["model.safetensors", "model.sig"])
    config = signing.Config().set_hashing_config(leaving_out).use_elliptic_key_signer(private_key=keys["alice"])
    config.sign(parts / "one", parts / "one" / "model.sig")
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert "model.safetensors was not there when it was signed" in ran.json["details"][0]
    tiny.reshard(parts / "two", parts / "apart", shards=1)  # weights where nothing is signed
    (parts / "apart" / ".git").mkdir()
    (parts / "apart" / "model-00001-of-00001.safetensors").rename(parts / "apart" / ".git" / "a.safetensors")
    index = parts / "apart" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00001", ".git/a"))
    for name in ("coldctl.json", "model.sig"):
        (parts / "apart" / name).unlink()
    signed_alone = hashing.Config().set_ignored_paths(paths=["model.sig"])
    config = signing.Config().set_hashing_config(signed_alone).use_elliptic_key_signer(private_key=keys["alice"])
    config.sign(parts / "apart", parts / "apart" / "model.sig")
    ran = fuse(coldctl, parts / "apart", base, tmp_path / "fused", trusted)
    assert ".git/a.safetensors is not covered by the signature of alice" in ran.json["details"][0], ran.stdout
    assert ".git/a.safetensors is not covered" in coldctl("check", parts / "apart", "--trusted-keys", trusted).stderr
    shutil.rmtree(parts / "apart")
    sharded = hashing.Config().use_shard_serialization().set_ignored_paths(paths=["model.sig"])
    config = signing.Config().set_hashing_config(sharded).use_elliptic_key_signer(private_key=keys["alice"])
    config.sign(parts / "one", parts / "one" / "model.sig")
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert "in a way that is not read here" in ran.json["details"][0]


def test_checkpoints_without_a_manifest_are_proven_by_the_signature_alone(
    signed: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    from coldctl.artifacts import signatures

    parts = Path(shutil.copytree(signed, tmp_path / "parts"))
    for name in ("one", "two"):
        (parts / name / "coldctl.json").unlink()
        signatures.sign(parts / name, keys["alice"])
    weights = parts / "two" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert [detail.split(": ", 1)[1] for detail in ran.json["details"]] == ["model.safetensors is not as it was signed"]
    shutil.rmtree(parts / "two")
    ran = fuse(coldctl, parts, base, tmp_path / "fused", trusted)
    assert {item["name"]: item["signer"] for item in ran.json["contributions"]} == {"one": "alice", "data-three": "bob"}


def test_contributions_in_a_store_are_verified_there(
    signed: Path, base: Path, trusted: Path, s3: S3, tmp_path: Path, coldctl: Run
) -> None:
    for path in signed.rglob("*"):
        if path.is_file():
            s3.client().upload_file(str(path), s3.bucket, f"parts/{path.relative_to(signed)}")
    place = f"s3://{s3.bucket}/parts"
    ran = coldctl("fuse", place, "--base", base, "--output", tmp_path / "a", "--trusted-keys", trusted, "--json")
    assert ran.code == 0, ran.stderr
    assert {item["signer"] for item in ran.json["contributions"]} == {"alice", "bob"}
    assert "signed by bob" in coldctl("check", f"{place}/three", "--trusted-keys", trusted, "--json").stdout
    s3.client().put_object(Bucket=s3.bucket, Key="parts/three/more/mine.json", Body=b"{}")
    ran = coldctl("fuse", place, "--base", base, "--output", tmp_path / "b", "--trusted-keys", trusted, "--json")
    assert "more/mine.json was not there when it was signed" in ran.json["details"][0]


def test_a_signed_contribution_in_a_store_is_left_alone(
    workshop: Path, contributions: Path, base: Path, keys: dict[str, Path], s3: S3, coldctl: Run
) -> None:
    assert (contributions / "one").is_dir()  # made of the same data
    place = f"s3://{s3.bucket}/one"
    call = ("finetune", workshop / "data-one", "--base", base, "--output", place, *FAST, "--jobs", 1, "--sign-key")
    assert coldctl(*call, keys["alice"]).code == 0
    assert "left alone" in coldctl(*call, keys["alice"]).stderr
    ran = coldctl(*call, keys["bob"])
    assert (ran.code, "is complete and not signed with" in ran.stderr) == (2, True), ran.stderr


def test_check_names_signers(signed: Path, contributions: Path, base: Path, trusted: Path, coldctl: Run) -> None:
    ran = coldctl("check", signed, "--trusted-keys", trusted, "--json")
    assert ran.code == 0, ran.stderr
    notes = {item["name"]: item["notes"] for item in ran.json["checked"]}
    assert "signed by bob" in notes["data-three"]
    assert "signed by alice" in notes["data-one"]
    ran = coldctl("check", contributions, "--base", base, "--trusted-keys", trusted, "--json")
    assert ran.code == 3
    assert all(item["tensors"] and "not signed" in item["problems"][0] for item in ran.json["checked"])


def test_finetuning_signs_and_signs_again_only_what_needs_it(
    base: Path, suite: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    flags = ("--suite", suite, "--base", base, "--output", tmp_path / "parts", "--jobs", 1)
    assert coldctl("finetune", *flags, "--sign-key", keys["alice"]).code == 0
    ran = coldctl("check", tmp_path / "parts", "--trusted-keys", trusted)
    assert ran.code == 0, ran.stderr
    for name in ("red", "green"):
        assert "alice" not in (tmp_path / "parts" / name / "coldctl.json").read_text()
    before = (tmp_path / "parts" / "red" / "model.sig").read_bytes()
    payload = base64.b64decode(json.loads(before)["dsseEnvelope"]["payload"])
    assert json.loads(payload)["subject"][0]["name"] == "model"  # not as the directory is called here
    assert "left alone" in coldctl("finetune", *flags, "--sign-key", keys["alice"]).stderr
    assert (tmp_path / "parts" / "red" / "model.sig").read_bytes() == before
    assert "left alone" in coldctl("finetune", *flags).stderr  # a signature is no part of the work's identity
    (tmp_path / "parts" / "red").rename(tmp_path / "elsewhere")
    (tmp_path / "parts" / "red").symlink_to(tmp_path / "elsewhere")
    ran = coldctl("finetune", *flags, "--sign-key", keys["bob"])
    assert ran.code == 0, ran.stderr
    assert "signed by bob" in coldctl("check", tmp_path / "parts", "--trusted-keys", trusted).stderr
    (tmp_path / "parts" / "green" / "notes.txt").write_text("later than the signature")
    assert "signed" in coldctl("finetune", *flags, "--sign-key", keys["bob"], "--only", "green").stderr
    assert coldctl("check", tmp_path / "parts" / "green", "--trusted-keys", trusted).code == 0
    (tmp_path / "parts" / "green" / "more.txt").symlink_to(tmp_path / "parts" / "green" / "notes.txt")
    ran = coldctl("finetune", *flags, "--sign-key", keys["bob"], "--only", "green")
    assert ran.code == 2
    assert "more.txt" in ran.stderr
    (tmp_path / "parts" / "red" / "config.json").write_text("{}")
    ran = coldctl("finetune", *flags, "--sign-key", keys["alice"], "--only", "red")
    assert ran.code == 2
    assert "config.json was changed" in ran.stderr
    ran = coldctl("finetune", *flags, "--sign-key", keys["alice"].with_suffix(".pub"), "--only", "red")
    assert (ran.code, "--sign-key" in ran.stderr) == (2, True)


@pytest.mark.parametrize("encoding", ["delta-int8", "lora"])
def test_differences_and_adapters_are_signed_likewise(
    encoding: str, dataset: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    how = ("--send", encoding, *(("--lora-rank", 2) if encoding == "lora" else ()))
    part = tmp_path / "part"
    ran = coldctl(
        "finetune", dataset, "--base", base, "--output", part, *FAST, *how, "--jobs", 1, "--sign-key", keys["bob"]
    )
    assert ran.code == 0, ran.stderr
    ran = fuse(coldctl, part, base, tmp_path / "fused", trusted)
    assert ran.code == 0, ran.stderr
    assert [item["signer"] for item in ran.json["contributions"]] == ["bob"]
    weights = next(path for path in part.iterdir() if path.suffix == ".safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ran = fuse(coldctl, part, base, tmp_path / "changed", trusted)
    assert ran.code == 2
    assert "not as it was signed" in ran.json["details"][0]


def test_revoking_a_key_over_two_iterations(
    signed: Path, base: Path, workshop: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    config = tmp_path / "run.toml"
    for name in ("one", "two"):
        tiny.make_dataset(tmp_path / name, seed=len(name))
    tables = "".join(f'[[dataset]]\nname = "{name}"\npath = "{name}"\n' for name in ("one", "two"))
    config.write_text(f'[run]\nbase = "{base}"\n[finetune]\nepochs = 1\nlearning_rate = 1e-3\n{tables}')
    run = tmp_path / "run"
    assert coldctl("plan", run, "--config", config, "--iterations", 2).code == 0
    owners = {1: {"one": "alice", "two": "bob"}, 2: {"two": "bob"}}
    for number in (1, 2):
        for name, owner in owners[number].items():
            ran = coldctl(
                "finetune", tmp_path / name, "--config", config, "--base", run, "--output", run, "--name", name,
                "--sign-key", keys[owner], "--jobs", 1,
            )  # fmt: skip
            assert ran.code == 0, ran.stderr
        iteration = run / f"iteration-{number:03d}"
        assert fuse(coldctl, iteration / "contributions", run, iteration / "fused", trusted).code == 0
        assert coldctl("promote", run).code == 0
    ran = coldctl("lineage", run, "--signer", keys["alice"].with_suffix(".pub"), "--json")
    assert ran.code == 3
    models = ran.json["models"]
    assert [item["iteration"] for item in models] == [1, 2]
    for item in models:  # the second one has it from its ancestor
        assert [(one["contribution"], one["iteration"]) for one in item["carried"]] == [("one", 1)]
        assert item["unsigned"] == 0
    there = coldctl("lineage", f"file://{run}", "--signer", "alice", "--json")  # likewise where it lies in a store
    assert (there.code, len(there.json["models"])) == (3, 2)
    ran = coldctl("lineage", run, "--signer", "alice")
    assert "2 of 2 models carry contributions signed by alice" in ran.stderr
    assert coldctl("lineage", run, "--signer", keys["mallory"].with_suffix(".pub")).code == 0
    ran = coldctl("lineage", run, "--signer", "alise")
    assert (ran.code, "known are alice, bob" in ran.stderr) == (2, True)
    assert coldctl("lineage", run, run).code == 2
    # What the docs say to do: take alice's key away, withdraw her contribution, look again.
    left = Path(shutil.copytree(trusted, tmp_path / "left"))
    (left / "alice.pem").unlink()
    first = run / "iteration-001"
    withdraw = ("fuse", first / "fused", "--without", "one", "--base", base, "--output", tmp_path / "mended")
    ran = coldctl(*withdraw)
    assert (ran.code, "--trusted-keys" in ran.stderr) == (2, True), ran.stderr
    ran = coldctl(*withdraw, "--trusted-keys", left)
    assert ran.code == 0, ran.stderr
    assert coldctl("lineage", tmp_path / "mended", "--signer", keys["alice"].with_suffix(".pub")).code == 0
    assert (
        coldctl("lineage", tmp_path / "mended", run, "--signer", "alice", "--json").json["models"][0]["carried"] == []
    )


def test_a_fused_model_as_a_contribution_brings_its_signers(
    signed: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path, coldctl: Run
) -> None:
    fuse(coldctl, signed, base, tmp_path / "inner", trusted)
    coldctl("fuse", tmp_path / "inner", signed / "three", "--base", base, "--output", tmp_path / "outer")
    ran = coldctl("lineage", tmp_path / "outer", "--signer", keys["alice"].with_suffix(".pub"), "--json")
    assert ran.code == 3
    assert [item["contribution"] for item in ran.json["models"][0]["carried"]] == ["inner"]
    assert ran.json["models"][0]["unsigned"] == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no key"),
        ("private", "it is a private key"),
        ("nothing", "cannot be used"),
        ("twice", "the same key"),
        ("pipe", "is no file"),
        ("both", "more than one key"),
        ("gone", "cannot be read: No such file or directory"),
        ("long", "too large for a key"),
        ("rsa", "another kind of key"),
    ],
)
def test_keys_that_cannot_be_used_are_named(
    content: str | None, words: str, signed: Path, base: Path, trusted: Path, keys: dict[str, Path], tmp_path: Path,
    coldctl: Run,
) -> None:  # fmt: skip
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    folder = tmp_path / "keys"
    folder.mkdir()
    if content == "gone":
        folder.rmdir()
    elif content == "long":
        (folder / "alice.pem").write_bytes(b"#" * (1 << 20))
    elif content == "rsa":
        private = rsa.generate_private_key(65537, 1024)
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / "alice.pem").write_bytes(public)
        (tmp_path / "rsa.key").write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        sign = ("finetune", "data", "--base", base, "--output", tmp_path / "x", "--sign-key", tmp_path / "rsa.key")
        assert "--sign-key" in (signing := coldctl(*sign)).stderr
        assert words in signing.stderr
    elif content == "private":
        shutil.copy(keys["alice"], folder / "alice.pem")
    elif content == "nothing":
        (folder / "alice.pem").write_text("-----BEGIN PUBLIC KEY-----\n")
    elif content == "both":
        (folder / "all.pem").write_bytes(b"".join(path.read_bytes() for path in sorted(trusted.iterdir())))
    elif content == "pipe":
        os.mkfifo(folder / "alice.pem")
    elif content == "twice":
        for name in ("a", "b"):
            shutil.copy(trusted / "alice.pem", folder / f"{name}.pem")
    ran = fuse(coldctl, signed, base, tmp_path / "fused", folder)
    assert ran.code == 2
    assert words in ran.stderr
    assert "--no-verify" in fuse(coldctl, signed, base, tmp_path / "fused", trusted, "--no-verify").stderr
