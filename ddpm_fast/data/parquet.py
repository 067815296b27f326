"""Parquet files of pictures: which column holds them, which says their class, and reading both a few rows at a time.

Files that the library `datasets` wrote say so in the schema's metadata; of others the columns' types and first values
tell, or --image-column and --label-column do.

Memory: pyarrow decodes a page at once, and a page may be all that a row group has of a column, as of the usual hundred
pictures per row group. So two to three times the largest row group's pictures are held, and never more than one's: the
files of the hub have 100 to 500 MB in each.
"""

import bisect
import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ddpm_fast.config import DataConfig
from ddpm_fast.data.image_files import is_encoded
from ddpm_fast.data.labels import NO_LABELS, Labels, from_values
from ddpm_fast.data.pictures import Contents, Encoded
from ddpm_fast.errors import InputError, nearest, require
from ddpm_fast.files import parse_json

ROWS_AT_ONCE, BYTES_AT_ONCE = 64, 32 << 20
"""Of a row group so much is taken out of pyarrow at once: rows, or fewer where they have as many bytes."""
READING = {"buffer_size": 1 << 20, "pre_buffer": False}
"""Of a file a megabyte is read at once: pyarrow would hold a row group as it is, beside what it makes of it."""
IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels", "class", "fine_label")
"""What columns are called; the first of several that would do is meant."""


def require_extra(name: str, *modules: str) -> None:
    """Refuse where the libraries of the extra `hub` are not installed: pyarrow, and these."""
    try:
        for module in ("pyarrow.parquet", *modules):
            importlib.import_module(module)
    except ImportError:
        raise InputError(f"--data {name} needs what is not installed: pip install 'ddpm-fast[hub]'") from None


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises of a damaged file into one line."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--data {file} is damaged or no parquet file ({reason})") from None


def asked_columns(data: DataConfig) -> tuple[bytes, bytes]:
    """Return what a store depends on beside the files."""
    return data.image_column.encode(), data.label_column.encode()


def look_through(name: str, files: Sequence[Path], data: DataConfig) -> Contents:
    """Return the pictures of files that hold the same columns, in their order.

    Args:
        name: of the data set, for messages.
        files: at least one.
        data: which columns are meant.

    Raises:
        InputError: a file is damaged or another kind of file, or no column is meant, or it is none that can be used.
    """
    import pyarrow.parquet as pq

    tables, counts = list[Table](), list[int]()
    for file in files:
        with _readable(file):
            metadata = pq.read_metadata(file)
            schema = metadata.schema.to_arrow_schema()
        tables.append(Table(name, file, schema))
        counts.append(metadata.num_rows)
    require(sum(counts) > 0, f"--data {name} holds no row")
    image = _image_column(tables[0], data.image_column)
    label = _label_column(tables[0], data.label_column)
    for table in tables[1:]:
        same = all(table.type_of(column) == tables[0].type_of(column) for column in (image, label) if column)
        require(same, f"--data {name}: {table.file.name} has other columns than {tables[0].file.name}")
    ends = list(accumulate(counts))

    def row_name(i: int) -> str:
        file = bisect.bisect_right(ends, i)
        return f"row {i - ends[file] + counts[file]:,} of {files[file].name}"

    labels = _read_labels(tables, label) if label else NO_LABELS
    if data.label_column and labels.values is None:
        raise InputError(f"--label-column {label}: a row of {name} has no value in it")
    return Contents(sum(counts), row_name, lambda: _blocks(files, image), labels)


@dataclass(frozen=True)
class Table:
    """One file's columns."""

    name: str
    """Of the data set."""
    file: Path
    schema: Any
    """pyarrow's."""

    @property
    def columns(self) -> list[str]:
        return list(self.schema.names)

    @property
    def described(self) -> str:
        return ", ".join(f"{field.name} ({_short(field.type)})" for field in self.schema)

    def type_of(self, column: str) -> Any:
        return self.schema.field(column).type if column in self.columns else None

    def declared(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the columns that the schema's metadata declares as "Image", say, with what it says of each."""
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            features = parse_json((self.schema.metadata or {})[b"huggingface"])["info"]["features"]
            found = {name: said for name, said in features.items() if isinstance(said, dict)}
            return {name: said for name, said in found.items() if said.get("_type") == kind and name in self.columns}
        return {}

    def require_column(self, flag: str, column: str) -> None:
        has = f"{self.name} has {self.described}.{nearest(column, self.columns)}"
        require(column in self.columns, f"{flag} {column} is no column: {has}")


def _short(kind: Any) -> str:
    return "struct" if str(kind).startswith("struct") else str(kind)


def _may_hold_pictures(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _may_hold_pictures(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _may_hold_classes(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind)


def _image_column(table: Table, asked: str) -> str:
    possible = [field.name for field in table.schema if _may_hold_pictures(field.type)]
    if asked:
        table.require_column("--image-column", asked)
        if asked not in possible:
            others = f"name another of {', '.join(possible)}" if possible else f"{table.name} has none that is"
            raise InputError(f"--image-column {asked} is {_short(table.type_of(asked))}, which is no image: {others}")
        return asked
    declared = [column for column in table.declared("Image") if column in possible]
    found = declared or [column for column in possible if _holds_pictures(table.file, column)]
    require(bool(found), f"--data {table.name}: no column is an image, of {table.described}")
    meant = _preferred(found, IMAGE_NAMES)
    if meant is None:
        raise InputError(
            f"--data {table.name} has several images in a row: name one of {', '.join(found)} by --image-column"
        )
    return meant


def _label_column(table: Table, asked: str) -> str | None:
    """Return the column of classes; None where there is none, or several and no usual name among them."""
    possible = [field.name for field in table.schema if _may_hold_classes(field.type)]
    if asked:
        table.require_column("--label-column", asked)
        kind = _short(table.type_of(asked))
        others = f"name one of {', '.join(possible)}" if possible else f"{table.name} has none that is"
        require(asked in possible, f"--label-column {asked} is {kind}, which is no class: {others}")
        return asked
    declared = [column for column in table.declared("ClassLabel") if column in possible]
    return _preferred(declared, LABEL_NAMES) or next((name for name in LABEL_NAMES if name in possible), None)


def _preferred(found: Sequence[str], names: Sequence[str]) -> str | None:
    return found[0] if len(found) == 1 else next((name for name in names if name in found), None)


def _batches(file: Path, column: str, rows: int) -> Iterator[list[Any]]:
    import pyarrow.parquet as pq

    with _readable(file), pq.ParquetFile(file, **READING) as opened:
        rows = min(rows, max(1, int(BYTES_AT_ONCE / (_bytes_per_row(opened.metadata, column) or 1))))
        for batch in opened.iter_batches(batch_size=rows, columns=[column], use_threads=False):
            yield batch.column(0).to_pylist()


def _bytes_per_row(metadata: Any, column: str) -> float:
    """Return the mean bytes of a column in a row, in the row group where they are most."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = [
        sum(
            part.total_uncompressed_size for part in map(group.column, range(group.num_columns)) if _is_of(part, column)
        )
        / max(1, group.num_rows)
        for group in groups
    ]
    return max(sizes, default=0.0)


def _is_of(part: Any, column: str) -> bool:
    return part.path_in_schema == column or part.path_in_schema.startswith(f"{column}.")


def _bytes(value: Any) -> Encoded:
    return value.get("bytes") if isinstance(value, dict) else value


def _holds_pictures(file: Path, column: str) -> bool:
    values = next(_batches(file, column, 1), [None])
    first = _bytes(values[0])
    return isinstance(first, bytes) and is_encoded(first)


def _blocks(files: Sequence[Path], column: str) -> Iterator[list[Encoded]]:
    for file in files:
        for values in _batches(file, column, ROWS_AT_ONCE):
            yield [_bytes(value) for value in values]


def _read_labels(tables: Sequence[Table], column: str) -> Labels:
    names = tables[0].declared("ClassLabel").get(column, {}).get("names")
    classes = [str(name) for name in names] if isinstance(names, list) else []
    values = [value for table in tables for rows in _batches(table.file, column, 1 << 16) for value in rows]
    return from_values(values, classes)
