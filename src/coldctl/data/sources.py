"""Sources of rows: files of one split each, or a Hub dataset."""

import csv
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from coldctl.common.errors import DataError
from coldctl.common.parsing import json_row
from coldctl.config.settings import DatasetConfig

FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")
ROW_LIMIT = 4 << 20  # characters of one row
_MOST_COLUMNS = 1000
_BATCH = 1024  # rows of a Hub dataset that are read at a time
_MOST_TIMES, _ANY_SIZE = 1000, 16 << 20  # characters of a parquet file per byte of it, and those always allowed
# A row of more than `ROW_LIMIT` characters is refused, so a batch holds at most 256 Mi characters that are kept.
_PARQUET_BATCH = 64  # rows
_PARQUET_OPTIONS = {
    "buffer_size": 1 << 20,  # bytes of a column that are read at a time; without it a whole row group is read at once
    "pre_buffer": False,
    "thrift_string_size_limit": 16 << 20,  # bytes of one text in the footer or in a page's header
    "thrift_container_size_limit": 100_000,  # entries of one list there: columns, row groups
}

Row = Mapping[str, Any]


def is_hub(reference: str) -> bool:
    """Return True if a DATA reference names a Hub dataset, `hf:[ORG/]NAME[:CONFIG]`."""
    return reference.startswith("hf:") and not reference.startswith("hf://")


class FileSource:
    """A directory with one file per split, or a single file, which is the train split."""

    def __init__(self, config: DatasetConfig) -> None:
        path = Path(config.path)
        self.label = str(path)
        columns = (config.text, config.text_pair or "text_pair", config.label)
        self._columns = {name for names in columns for name in ((names,) if isinstance(names, str) else names)}
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
        """Return the names of the splits."""
        return list(self._files)

    def class_names(self) -> list[str] | None:
        """Return None: files do not name their classes."""
        return None

    def rows(self, split: str) -> Iterator[Row]:
        """Yield the rows of a split in order. Raises DataError, which names the wrong line."""
        path = self._files[split]
        read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix, _read_table)
        try:
            yield from read(path, self._columns)
        except UnicodeDecodeError:
            raise DataError(
                f"{path} is not UTF-8 text (byte {_undecodable(path)}): convert it, for example with iconv"
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None


def _undecodable(path: Path) -> int:
    """Return the offset in the file of the first byte that is not UTF-8; a stream's decoder knows only its own."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return start + error.start
            start += len(line)
    return start


def _lines(file: IO[str], label: str) -> Iterator[str]:
    """Yield the lines of a file. Raises DataError for one of more than `ROW_LIMIT` characters before all of it is read."""
    number = 0
    while line := file.readline(ROW_LIMIT + 1):
        number += 1
        if len(line) > ROW_LIMIT:
            raise DataError(
                f"{label}, line {number}: it is longer than {ROW_LIMIT} characters: cut the text or split it"
            )
        yield line


def _read_jsonl(path: Path, _: Collection[str]) -> Iterator[Row]:
    # Only "\n" ends a line: other line ends may stand inside a text.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(_lines(file, str(path)), start=1):
            if not line.strip():
                continue
            try:
                row = json_row(line.removesuffix("\n"))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error}): write one object per line") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object: write one object per line")
            yield row


class _Records:
    """The lines of a table, for the csv module. A quoted field may span several, but not more than `ROW_LIMIT` characters."""

    def __init__(self, file: IO[str], label: str) -> None:
        self._lines, self._label = _lines(file, label), label
        self.taken = 0  # characters of the row that csv is reading

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.taken += len(line)
            if self.taken > ROW_LIMIT:
                raise DataError(f"{self._label}: a row is longer than {ROW_LIMIT} characters: is a quote left open?")
            yield line


def _read_table(path: Path, _: Collection[str]) -> Iterator[Row]:
    tabs = path.suffix == ".tsv"
    csv.field_size_limit(ROW_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as file:  # the csv module knows line ends
        records = _Records(file, str(path))
        reader = csv.DictReader(
            iter(records), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        )
        try:
            names = reader.fieldnames or []
            if doubled := next((name for name in names if names.count(name) > 1), None) if len(names) < 1000 else "":
                raise DataError(f"{path}: two columns are called {doubled!r}: rename or remove one")
            if len(names) >= _MOST_COLUMNS:
                raise DataError(f"{path}: it has {len(names)} columns, at most {_MOST_COLUMNS} are read: remove some")
            for row in reader:
                records.taken = 0
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {reader.line_num}: it has not as many columns as the header: mend that line"
                    )
                yield row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}: mend that line") from None


def _read_parquet(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """Yield rows of these columns; if one is missing, one row with the names of all that the file has."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install 'coldctl[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path, **_PARQUET_OPTIONS) as file:
            names = file.schema_arrow.names
            if set(columns) - {"text_pair", *names}:
                yield dict.fromkeys(names, "")  # the caller's error lists them
                return
            chosen = [name for name in dict.fromkeys(names) if name in columns]
            if doubled := next((name for name in chosen if names.count(name) > 1), None):
                raise DataError(f"{path}: two columns are called {doubled!r}: rename or remove one")
            unpacked, size = 0, path.stat().st_size
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=chosen):
                rows = batch.to_pylist()
                unpacked += len(rows) + sum(
                    len(value) for row in rows for value in row.values() if isinstance(value, str)
                )
                if unpacked > max(_ANY_SIZE, _MOST_TIMES * size):
                    raise DataError(f"{path} unpacks to more than {_MOST_TIMES} times its size: do not use it")
                yield from rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise DataError(f"{path} is not a readable parquet file ({reason}): write it again") from None


class HubSource:
    """A dataset of the Hugging Face Hub, read by the `datasets` library, at a pinned revision if one is configured."""

    def __init__(self, config: DatasetConfig) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError(f"{config.path} needs the datasets library: pip install 'coldctl[data]'") from None
        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
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
        """Return the names of the splits."""
        return list(self._data)

    def class_names(self) -> list[str] | None:
        """Return the classes that labels, or lists of labels, are indices of, if the dataset names them."""
        feature = next(iter(self._data.values())).features.get(self._label_column)
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        return list(names) if names else None

    def rows(self, split: str) -> Iterator[Row]:
        """Yield the rows of a split in order."""
        for batch in self._data[split].iter(batch_size=_BATCH):  # row by row it would take ten times as long
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
