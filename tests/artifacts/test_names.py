"""Names, labels and licences from strangers: whatever they hold, it is only ever text where it is shown."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from coldctl.common import text
from conftest import FAST, Ran
from helpers import tiny
from helpers.forge import forge

Run = Callable[..., Ran]

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\u2066\ud800"[:-1]  # clear, title, C1, turned directions
# What may be a directory's name; and what only a manifest can say.
NAME = f"- 1. {ESCAPES}[bold]b <script>alert(1)<!-- `c` | *e* _u_ $\\frac$ & [a](javascript:x) www.evil.example @x"
NAME = NAME.replace("\\", "")
WORDS = f"{NAME}[/]\n\n# head\n\n```\nhttps://evil.example/x\n~~~\r\n<img src=x onerror=alert(1)>\n</summary>\n\\"
FORBIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# What our own documents contain of HTML and links.
OUR_HTML = re.compile(r"</?(details|summary)>|<details><summary>[^<>]*</summary>")
OUR_LINKS = (
    "https://arxiv.org/",
    "https://pypi.org/project/coldctl/",
    "https://github.com/IBM/",
    "results.json",
    "report.md",
)


def markup_in(document: str) -> list[str]:
    """What a Markdown renderer makes of a document beyond text: HTML, links, images that are not ours."""
    body = re.sub(r"\A---\n.*?\n---\n", "", document, flags=re.DOTALL)
    body = re.sub(r"^```mermaid\n.*?\n```$", "", body, flags=re.DOTALL | re.MULTILINE)
    found = []
    tokens = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(body)
    for token in [*tokens, *(child for block in tokens for child in block.children or [])]:
        if token.type in ("html_block", "html_inline") and OUR_HTML.sub("", token.content).strip():
            found.append(token.content)
        if token.type == "link_open" and not str(token.attrs["href"]).startswith(OUR_LINKS):
            found.append(str(token.attrs["href"]))
        if token.type == "image" and token.attrs["src"] != "gain.png":
            found.append(str(token.attrs["src"]))
        if token.type == "heading_open" and token.tag == "h1" and "# head" in document.split("\n"):
            found.append("# head")
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, base: Path, contributions: Path) -> Path:
    """A folder of contributions whose every word is hostile."""
    folder = tmp_path_factory.mktemp("planted") / "folder"
    for name in ("one", "two"):
        forge(
            contributions / name, folder / name, name=f"{name}{NAME}"[:199].encode()[:199].decode(errors="ignore"),
            license=WORDS, created=WORDS, environment={"device": WORDS, "threads": 2, "training_seconds": 1.0},
            dataset={"name": WORDS, "source": f"evil/{WORDS}", "labels": [WORDS], "num_train": 3},
            config={"epochs": WORDS, "batch_size": 3},
        )  # fmt: skip
    tiny.perturb(base, folder / NAME, seed=3)
    broken = tiny.perturb(base, folder / f"broken{NAME}", seed=4)
    (broken / "model.safetensors").write_bytes(b"\x1b[2J")
    return folder


@pytest.fixture(scope="module")
def fused(planted: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    from conftest import run_coldctl

    out = tmp_path_factory.mktemp("fused") / NAME
    ran = run_coldctl("fuse", planted, "--base", base, "--output", out, "--screen", "reject", "--json")
    assert ran.code == 0, ran.stderr
    return out, ran


def harmless(ran: Ran) -> None:
    assert "Traceback" not in ran.stderr
    for said in (ran.stdout, ran.stderr):
        assert not FORBIDDEN.search(said), FORBIDDEN.search(said)


def test_screens_and_json(planted: Path, base: Path, fused: tuple[Path, Ran], coldctl: Run) -> None:
    out, ran = fused
    harmless(ran)
    assert any(item["name"] == NAME for item in ran.json["contributions"])  # JSON keeps what it escapes
    assert (out / "fuse.png").stat().st_size > 1000
    for command in (
        ("check", planted, "--base", base),
        ("check", planted, "--base", base, "--deep", "--json"),
        ("lineage", out),
        ("lineage", out, "--json"),
        ("fuse", planted, "--base", base, "--output", out.with_name("other")),
        ("status", planted / NAME),
        ("finetune", planted / NAME, "--base", planted / f"broken{NAME}", "--output", out.with_name("other"), *FAST),
        ("publish", planted / f"broken{NAME}", "--to", out.with_name("other"), "--license", WORDS),
    ):
        ran = coldctl(*command)
        harmless(ran)
        assert command[0] not in ("check", "lineage") or "[bold]" in ran.stderr + ran.stdout


def test_a_terminal_sees_only_our_own_codes(planted: Path, base: Path, tmp_path: Path) -> None:
    flags = ("--output", tmp_path / "out", "--screen", "reject")
    for command in (("fuse", planted, "--base", base, *flags), ("fuse", planted, NAME, f"--{NAME}")):
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "coldctl", *map(str, command)], stderr=follower, stdout=follower,
            env={**os.environ, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(follower)
        seen = b""
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:
                break
            if not part:
                break
            seen += part
        assert process.wait() == (0 if "--output" in command else 2)
        shown = seen.decode()
        assert "\x1b]0;owned" not in shown
        assert "\x1b[2J" not in shown
        assert not FORBIDDEN.search(re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", shown))


def test_cards_reports_and_pages(
    fused: tuple[Path, Ran], base: Path, dataset: Path, tmp_path: Path, coldctl: Run
) -> None:
    out, _ = fused
    named = NAME.replace("/", "").replace('"', "")
    shown = "".join(letter for letter in named if letter.isprintable()).lstrip("-. 1")
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f"[finetune]\nepochs = 1\n[[dataset]]\nname = {json.dumps(shown)}\npath = {json.dumps(str(dataset))}\nlicense = 'mit'\n"
    )
    model = Path(shutil.copytree(base, tmp_path / named))
    evaluation = tmp_path / "evaluation"
    ran = coldctl("evaluate", out, "--baseline", model, "--suite", suite, "--output", evaluation, "--jobs", 1)
    assert ran.code == 0, ran.stderr
    harmless(ran)
    # Fused once more, so that hostile records stand among the ancestors too.
    ran = coldctl(
        "publish", out, "--to", tmp_path / "published", "--license", "mit", "--evaluation", evaluation, "--name", shown
    )
    assert ran.code == 0, ran.stderr
    harmless(ran)
    card, markers = re.subn(
        r"^<!-- coldctl:(begin|end) [a-z-]+ -->\n",
        "",
        (tmp_path / "published" / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    assert markers == 2 * 8
    report = (evaluation / "report.md").read_text()
    for document in (card, report):
        assert not FORBIDDEN.search(document)
        assert markup_in(document) == []
        assert "script" in document
    columns: list[int] = []
    for line in report.splitlines():
        columns = [*columns, len(re.findall(r"(?<!\\)\|", line))] if line.startswith("|") else []
        assert len(set(columns)) <= 1, line
    page = (evaluation / "report.html").read_text()
    assert not FORBIDDEN.search(page)
    assert page.count("<script") == 1
    assert "onerror=" not in re.sub(r"&lt;img[^<]*", "", page)
    graph = re.search(r"^```mermaid\n(.*?)\n```$", card, flags=re.DOTALL | re.MULTILINE)
    assert graph is not None
    assert not set("<>`|$&") & set(re.sub(r"<br/>|-->|\.->", "", graph[1]))


@pytest.mark.parametrize(
    "start", ["- a", "+ a", "1. a", "12) a", "    a", "# a", "> a", "= a", "--- ", "|a|", "&lt;b&gt;", "_a_", "~~a~~"]
)
def test_markdown_is_text_wherever_it_begins(start: str) -> None:
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text.markdown(start) + "\n")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    inline = tokens[1].children or []
    assert {token.type for token in inline} <= {"text", "text_special"}
    assert "".join(token.content for token in inline) == start.strip()
