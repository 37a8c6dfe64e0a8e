"""Where rows come from: files of one split each, or a dataset of the Hub. Rows pass by one at a time."""

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coldctl.core.config import DatasetConfig
from coldctl.core.errors import DataError

FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")
_BATCH = 1024  # rows that are taken out of a columnar file at a time
_BUFFER = 1 << 20  # bytes of a column that are read at a time; without it a million rows may be read at once

Row = Mapping[str, Any]


class FileSource:
    """A directory with one file per split, or a single file, which is the train split."""

    def __init__(self, config: DatasetConfig) -> None:
        path = Path(config.path)
        self.label = str(path)
        if path.is_file():
            if path.suffix not in FORMATS:
                raise DataError(f"{path}: unknown format {path.suffix!r}: give one of {', '.join(FORMATS)}")
            self._files = {"train": path}
        elif path.is_dir():
            self._files = {}
            for child in sorted(path.iterdir()):
                if child.suffix in FORMATS and not child.name.startswith("."):
                    if child.stem in self._files:
                        raise DataError(
                            f"{path} has both {self._files[child.stem].name} and {child.name}: keep one of them"
                        )
                    self._files[child.stem] = child
            if not self._files:
                raise DataError(
                    f"{path} holds no data: put train{FORMATS[0]} (validation, test) there; {', '.join(FORMATS)} are read"
                )
        else:
            raise DataError(f"no data at {path}: check the path, or write hf:ORG/NAME for a Hub dataset")

    def splits(self) -> list[str]:
        """The names of the splits that are there."""
        return list(self._files)

    def class_names(self) -> list[str] | None:
        """Files do not name their classes."""
        return None

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of a split in order. Raises DataError that says which line is wrong."""
        path = self._files[split]
        read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix, _read_table)
        try:
            yield from read(path)
        except UnicodeDecodeError:
            raise DataError(
                f"{path} is not UTF-8 text (byte {_undecodable(path)}): convert it, for example with iconv"
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None


def _undecodable(path: Path) -> int:
    """The place in the file of the first byte that is not UTF-8; a decoder that streams knows only its own."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return start + error.start
            start += len(line)
    return start


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Only "\n" ends a line: other line ends may stand inside a text.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removesuffix("\n"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error}): write one object per line") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object: write one object per line")
            yield row


def _read_table(path: Path) -> Iterator[Row]:
    tabs = path.suffix == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:  # the csv module knows line ends
        reader = csv.DictReader(
            file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        )
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {reader.line_num}: it has not as many columns as the header: mend that line"
                    )
                yield row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}: mend that line") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install 'coldctl[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file ({str(error).splitlines()[0]}): write it again"
        ) from None


class HubSource:
    """A dataset of the Hugging Face Hub, through the `datasets` library, at a pinned revision if one is given."""

    def __init__(self, config: DatasetConfig) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError(f"{config.path} needs the datasets library: pip install 'coldctl[data]'") from None
        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it prints each of its retries
        name, _, subset = config.path.removeprefix("hf:").partition(":")
        self.label = config.path
        self._label_column = config.label
        try:
            self._data = datasets.load_dataset(name, subset or None, revision=config.revision)
        except Exception as error:  # network, missing names, formats: the library has no common exception
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            remedy = "check the name and the network, or give local files"
            raise DataError(f"{config.name}: cannot load {config.path} from the Hub: {reason}: {remedy}") from None

    def splits(self) -> list[str]:
        """The names of the splits that are there."""
        return list(self._data)

    def class_names(self) -> list[str] | None:
        """The classes that the labels, or the labels' lists, are indices of, where the dataset says so."""
        feature = next(iter(self._data.values())).features.get(self._label_column)
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        return list(names) if names else None

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of a split in order."""
        for batch in self._data[split].iter(batch_size=_BATCH):  # row by row it would take ten times as long
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
