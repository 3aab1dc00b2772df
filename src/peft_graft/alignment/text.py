"""Text for alignment: a sentence a line, columns of a data file, or a data set of the hub, as a stream of samples."""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar, cast

from peft_graft.alignment.json_rows import check_json, columns_of, has_a_row_a_line
from peft_graft.alignment.tables import rows_of_table
from peft_graft.errors import GraftError, TextError, reason
from peft_graft.models.places import hub_id_of

#: Columns tried in this order when none are named.
KNOWN_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("tokens",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence",),
    ("question", "context"),
    ("content",),
)
#: What ``datasets`` reads a type of file with.
_READERS = {
    ".txt": ("text", "TextDatasetReader"),
    **dict.fromkeys((".jsonl", ".json"), ("json", "JsonDatasetReader")),
    **dict.fromkeys((".csv", ".tsv"), ("csv", "CsvDatasetReader")),
    ".parquet": ("parquet", "ParquetDatasetReader"),
}
_SHUFFLE_BUFFER = 20_000
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sample:
    """One sentence, or a pair of them as the models will see it."""

    first: str
    second: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The one or two texts."""
        return (self.first,) if self.second is None else (self.first, self.second)


TextLike = str | Path | Iterable["str | tuple[str, str] | Sequence[str] | Sample"]


@dataclass(frozen=True)
class Source:
    """What a run reads: a file, a data set of the hub, or Python objects.

    Attributes:
        text: a name for ``read_text``, or the objects. columns, seed: as for ``read_text``.
    """

    text: Any
    columns: tuple[str, ...] | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """What records call it."""
        return str(self.text) if isinstance(self.text, str | Path) else "given in memory"

    @cached_property
    def key(self) -> str | None:
        """What tells its rows and their order from any other's; None for what may change: hub data, objects."""
        return content_key(self.text, self.columns, self.seed)


class TextSource(Source):
    """The unlabelled text of a run; in memory strings, pairs of strings and lists of tokens (``TextLike``)."""

    def samples(self) -> Iterator[Sample]:
        """The samples; the first is read at once, so that a bad source fails here.

        Raises:
            TextError: see ``read_text``.
        """
        if isinstance(self.text, str | Path):
            found = read_text(self.text, self.columns, self.seed)
        else:
            found = _not_empty(as_samples(self.text, self.columns), self.name)
        return chain([next(found)], found)


def rows_given(text: Any, where: str = "text") -> Any:
    """Text or prompts that a user gave in Python, as what can be read row by row; a name as it is.

    Raises:
        TextError: it cannot be read so.
    """
    if isinstance(text, str | Path):
        return text
    if hasattr(text, "to_dict") and hasattr(text, "columns"):  # of pandas; going through one gives its columns' names
        return rows_of_table(text)
    if isinstance(text, Mapping):
        raise TextError(
            "a dictionary, such as a data set with several splits, holds no rows",
            where=where,
            found=", ".join(map(str, text)),
            fix="give one split, or a list of rows",
        )
    if isinstance(text, bytes) or not isinstance(text, Iterable):
        raise TextError(
            "this cannot be read as text",
            where=where,
            expected="a file, a hub data set, or strings or rows in a list, a datasets.Dataset or a pandas.DataFrame",
            found=type(text).__name__,
        )
    return text


def content_key(text: object, columns: Sequence[str] | None, seed: int) -> str | None:
    """What tells the rows of a file and their order from any other's; None for what is no file and so may change."""
    if not isinstance(text, str | Path) or not Path(text).is_file():
        return None
    with Path(text).open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps([content, columns, seed])


def read_text(source: str | Path, columns: Sequence[str] | None = None, seed: int = 0) -> Iterator[Sample]:
    """Stream the samples of a source in random order.

    Args:
        source: a file (.txt with a sentence a line; .jsonl, .json, .csv, .tsv, .parquet) or a data set of the hub as
            ``owner/name``, ``owner/name:config`` or ``owner/name:config:split`` (split ``train`` unless given).
        columns: one column of texts or of token lists, or two columns of sentence pairs; found by their usual names
            (``KNOWN_COLUMNS``) when not given.
        seed: of the shuffling, within a buffer of 20,000 rows.

    Raises:
        TextError: no such file or data set, an unknown file type, a missing column, or no text in it.
    """
    name = str(source)
    return _not_empty(_samples(name, (row for _, row in shuffled_rows(name, seed)), columns), name)


def as_samples(
    texts: Iterable[str | tuple[str, str] | Sequence[str] | Sample | Mapping[str, Any]],
    columns: Sequence[str] | None = None,
) -> Iterator[Sample]:
    """Samples from Python objects: strings, pairs of strings (tuples), lists of tokens; or rows, as for ``read_text``.

    Raises:
        TextError: one of them is none of these.
    """
    source = iter(texts)
    begin = list(islice(source, 1))
    if begin and isinstance(begin[0], Mapping) and source is not texts:
        rows = cast("Iterator[Mapping[str, Any]]", chain(begin, source))
        yield from _samples("given in memory", rows, columns)
        return
    for text in chain(begin, source):
        if isinstance(text, Sample):
            yield text
        elif isinstance(text, str):
            yield Sample(text)
        elif isinstance(text, tuple) and len(text) == 2 and _are_strings(text):
            yield Sample(*text)
        elif isinstance(text, Sequence) and not isinstance(text, tuple | bytes) and _are_strings(text):
            yield Sample(" ".join(text))
        elif text is not None:  # as it is left out of files
            # Of prompts an iterator shows none before it is read.
            prompts = isinstance(text, Mapping) or hasattr(text, "messages")
            raise TextError(
                "this is no text",
                where="given in memory",
                expected="strings, pairs of strings or lists of tokens",
                found=type(text).__name__,
                fix="give prompts as a list, which can be read more than once" if prompts else None,
            )


def _are_strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


#: How pandas calls what it takes for an index.
_INDEX = "__index_level_"


def load_rows(source: str, *, streaming: bool = False) -> Any:
    """The rows of a file or of a data set of the hub, as ``datasets`` loads them; names as for ``read_text``.

    Raises:
        TextError: no such file or data set, or an unknown file type.
    """
    suffix = _suffix(source)
    from datasets import Dataset, NamedSplit, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    with _explained(source):
        if suffix is None:
            name, config, split = [*source.split(":"), "", ""][:3]
            return load_dataset(name, config or None, split=split or "train", streaming=streaming)
        if suffix in (".json", ".jsonl"):
            check_json(source)
        if suffix == ".json" and (columns := columns_of(source)) is not None:
            return Dataset.from_dict(columns)
        # Not by ``load_dataset``, which tells a host that files are read.
        module, reader = _READERS[suffix]
        options = {"delimiter": "\t"} if suffix == ".tsv" else {}
        read = getattr(importlib.import_module(f"datasets.io.{module}"), reader)
        files = glob.escape(str(Path(source).resolve()))
        found = read(files, split=NamedSplit("train"), streaming=streaming, **options).read()
        if suffix in (".csv", ".tsv"):
            _check_fields(found, source)
        return found


def _check_fields(rows: Any, source: str) -> None:
    """Refuse a table whose rows have more fields than its first line has names: pandas takes the first for an index.

    Raises:
        TextError: it is one.
    """
    names: Iterable[Any] = rows.column_names or next(iter(rows), {})
    if any(str(name).startswith(_INDEX) for name in names):
        raise TextError(
            "the rows have more fields than the first line has names",
            where=source,
            expected=", ".join(str(name) for name in names if not str(name).startswith(_INDEX)),
            fix='put texts with the separator in them in quotes ("...")',
        )


def _suffix(source: str) -> str | None:
    """The type of a text file; None for a data set of the hub.

    Raises:
        TextError: no such file, or an unknown type.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    known = tuple(_READERS)
    if path.is_file():
        if suffix not in known:
            raise TextError(
                "unknown type of text file",
                where=source,
                expected=f"one of {', '.join(known)}",
                found=suffix or "no suffix",
            )
        return suffix
    if path.is_dir():
        raise TextError(
            "is a folder, not a file of text",
            where=source,
            expected=f"a file: {', '.join(known)}",
            fix="name the file in it; a data set of datasets is given in Python, as load_from_disk(...)",
        )
    if path.exists() or suffix in known or source.count("/") > 1:
        raise TextError("no such text file", where=source, fix="give a file, or a hub data set as owner/name")
    if hub_id_of(source.partition(":")[0]) is None:
        raise TextError(
            "no such text file, nor the name of a data set",
            where=source,
            fix="give a file, a hub data set as owner/name, or in Python a list of strings",
        )
    return None


def shuffled_rows(source: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source in random order, each with its place (``line 3``; ``a row`` of hub data); see ``read_text``.

    Raises:
        TextError: no such file or data set, an unknown file type, or rows that cannot be read.
    """
    if _suffix(source) is not None:  # not shuffled by ``datasets``, through threads that take five seconds to end
        yield from shuffled(_placed_rows(source), seed)
        return
    with _explained(source):  # ``datasets`` shuffles the order of the remote files too
        for row in load_rows(source, streaming=True).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER):
            yield "a row", row


def first_row(source: str) -> dict[str, Any] | None:
    """The first row as it stands in a source, None in an empty one; its errors are those of ``shuffled_rows``."""
    return next((row for _, row in _placed_rows(source)), None)


def _placed_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows as they stand in a source, each with its place."""
    suffix = _suffix(source)
    with _explained(source):
        if suffix == ".txt" or (suffix == ".jsonl" and has_a_row_a_line(source)):
            yield from _lines(source, suffix)
        else:
            for number, row in enumerate(load_rows(source, streaming=True), start=1):
                yield f"row {number}", row


def _lines(source: str, suffix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file with one a line, without importing ``datasets``, which takes longer than a small pass."""
    with Path(source).open(encoding="utf-8-sig") as file:
        columns: dict[str, None] = {}  # of the first row; what a later one lacks is None
        for number, line in enumerate(file, start=1):
            if suffix == ".txt":
                yield f"line {number}", {"text": line.rstrip("\n")}
            elif line.strip():
                with _explained(f"{source} line {number}"):
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"a line holds no object but {type(row).__name__}")
                columns = columns or dict.fromkeys(row)
                yield f"line {number}", {**columns, **row}


def shuffled(rows: Iterable[_T], seed: int) -> Iterator[_T]:
    """The same rows in random order, within a buffer."""
    order, buffer = random.Random(seed), list[_T]()
    for row in rows:
        if len(buffer) < _SHUFFLE_BUFFER:
            buffer.append(row)
            continue
        index = order.randrange(_SHUFFLE_BUFFER)
        yield buffer[index]
        buffer[index] = row
    order.shuffle(buffer)
    yield from buffer


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Errors of ``datasets`` and of files as ours."""
    try:
        yield
    except GraftError:
        raise
    except (ConnectionError, FileNotFoundError) as error:  # DatasetNotFoundError is one of the latter
        raise TextError(
            f"no such data set, or the hub cannot be reached ({type(error).__name__}: {reason(error)})",
            where=source,
            fix="check the name, or give a local file",
        ) from error
    except UnicodeDecodeError as error:
        fix = "convert it: iconv -f latin1 -t utf-8 OLD > NEW, with the encoding that it is in"
        place = _undecodable(Path(source))
        raise TextError("the text cannot be read as UTF-8", where=place, found=reason(error), fix=fix) from error
    except Exception as error:  # of a damaged file ``datasets`` raises what comes
        said = reason(error).removeprefix(f"{type(error).__name__}: ")
        raise TextError(f"the text cannot be read ({type(error).__name__}: {said})", where=source) from error


def _undecodable(file: Path) -> str:
    """A file, with its first line that is not in UTF-8."""
    with file.open("rb") as lines:
        found = (number for number, line in enumerate(lines, 1) if line.decode(errors="ignore").encode() != line)
        return f"{file} line {next(found, '?')}"


def check_columns(row: Mapping[str, Any], columns: Sequence[str], where: str, fix: str) -> None:
    """Refuse columns that a row lacks, or more than two.

    Raises:
        TextError: it lacks one, or there are more.
    """
    missing = [column for column in columns if column not in row]
    if missing or len(columns) > 2:
        raise TextError(
            "the text has no such columns" if missing else "too many columns",
            where=where,
            expected=f"some of {', '.join(row)}" if missing else "one or two",
            found=", ".join(missing) if missing else len(columns),
            fix=fix,
        )


def _choose_columns(row: Mapping[str, Any], columns: Sequence[str] | None, source: str) -> tuple[str, ...]:
    if columns:
        check_columns(row, columns, source, _NAME_THEM)
        return tuple(columns)
    return usual_columns(row, source, _NAME_THEM)


_NAME_THEM = "name one column, or two for sentence pairs, with --columns"


def usual_columns(names: Collection[str], source: str, fix: str, before: str = "") -> tuple[str, ...]:
    """The columns of text among these, by their usual names (``KNOWN_COLUMNS``).

    Args:
        before: what else the error says that there might have been.

    Raises:
        TextError: there is none.
    """
    for known in KNOWN_COLUMNS:
        if all(column in names for column in known):
            return known
    raise TextError(
        "no column with a usual name",
        where=source,
        expected=before + " or ".join("+".join(known) for known in KNOWN_COLUMNS),
        found=", ".join(names),
        fix=fix,
    )


def _samples(source: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None) -> Iterator[Sample]:
    chosen: tuple[str, ...] | None = None
    for row in rows:
        if not isinstance(row, Mapping):
            raise TextError("a row is none", where=source, expected="a dict, as the first is", found=type(row).__name__)
        chosen = chosen or _choose_columns(row, columns, source)
        texts = [_as_text(row[column], column, source) for column in chosen]
        if texts[0].strip():
            yield Sample(*texts)


def _as_text(value: Any, column: str, source: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(token, str) for token in value):
        return " ".join(value)
    raise TextError(
        "the column holds no text",
        where=f"{source} column {column}",
        expected="strings or lists of tokens",
        found=type(value).__name__,
        fix="name another column with --columns",
    )


def _not_empty(samples: Iterator[Sample], source: str) -> Iterator[Sample]:
    empty = True
    for sample in samples:
        empty = False
        yield sample
    if empty:
        raise TextError("the text is empty", where=source, fix="give a source with at least a few hundred sentences")
