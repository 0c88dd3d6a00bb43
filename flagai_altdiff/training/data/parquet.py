"""Parquet files with an image in each row, or with the name of one beside them. A part is a group of rows."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from flagai_altdiff.decoding import UNREADABLE
from flagai_altdiff.errors import BrokenExampleError, DataError, MissingDependencyError, printable
from flagai_altdiff.files import open_regular
from flagai_altdiff.training.data.example import Tally
from flagai_altdiff.training.data.fields import FIELDS, Facts, read_fields
from flagai_altdiff.training.data.folder import FILE_FIELDS, NO_FILE, OUTSIDE, is_inside
from flagai_altdiff.training.data.shard_names import endings_apart
from flagai_altdiff.training.data.source import Choose, Recent, Rows

NOT_PARQUET, EMPTY = "parquet file cannot be read", "parquet file without rows"
BOMB = "rows that unpack to far more than the file has"
_MOST_ROWS = 1 << 24
_FREE_BYTES, _MOST_TIMES = 16 << 20, 200
"""A group of rows may unpack to the first, and to so many times its size; images hardly shrink, texts do ten times."""
_LARGE_ROWS, _SMALL_ROWS = 16, 1 << 16
"""How many rows are unpacked between two looks at how much it is: of values of any size, and of short ones."""
_AT_HAND_BYTES = 256 << 20
"""Groups of rows that each worker may have in memory."""
_MOST_LANES = 64


class ParquetFiles:
    """Rows of parquet files.

    Args:
        files: In order.
    """

    has_images = True

    def __init__(self, files: Sequence[Path]) -> None:
        _pyarrow()
        self.left_out = Tally()
        self._groups: list[tuple[Path, int, str]] = []
        sizes, weights = list[int](), list[int]()
        for file, label in zip(files, endings_apart(list(map(str, files))), strict=True):
            try:
                table = _opened(file)
                _image_column(table.schema_arrow, file)
                groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
                if max((group.num_rows for group in groups), default=0) > _MOST_ROWS:
                    raise ValueError(f"a group of more than {_MOST_ROWS:,} rows")
            except DataError:
                raise
            except _arrow_errors() as error:
                self.left_out.add(NOT_PARQUET, f"{file}: {printable(str(error), 120)}")
                continue
            if not sum(group.num_rows for group in groups):
                self.left_out.add(EMPTY, str(file))
            self._groups += [(file, i, label) for i in range(len(groups))]
            sizes += [group.num_rows for group in groups]
            weights += [group.total_byte_size for group in groups]
        self.sizes = tuple(sizes)
        self.lanes = max(1, min(_MOST_LANES, _AT_HAND_BYTES * len(weights) // max(sum(weights), 1)))
        self._at_hand = Recent[RowGroup](self.lanes)

    def part(self, number: int) -> RowGroup:
        """A group of rows."""
        return self._at_hand.get(number, lambda: RowGroup(*self._groups[number], self.sizes[number]))

    def remembered(self, number: int, wanted: str, choose: Choose) -> tuple[Rows, Tally]:
        """Chosen anew at each opening: the columns of texts are read quickly."""
        return choose()


class RowGroup:
    """One group of rows.

    Args:
        file: The file.
        number: Its number there.
        label: What the names of its rows begin with.
        size: Its rows.
    """

    def __init__(self, file: Path, number: int, label: str, size: int) -> None:
        self._file, self._number, self._label, self._size = file, number, label, size

    def __len__(self) -> int:
        return self._size

    def key(self, row: int) -> str:
        """The file's label, the group and the row."""
        return f"{self._label}/{self._number}/{row}"

    def facts(self, row: int) -> Facts:
        """What its columns of texts and numbers say."""
        return read_fields(self._row(row, images=False))

    def open(self, row: int) -> BinaryIO:
        """The image: the row's own, or the file beside that it names."""
        column, found = self._column, self._row(row, images=True)[self._column]
        if isinstance(found, dict):
            found = found["bytes"] if found.get("bytes") is not None else found.get("path")
        if isinstance(found, bytes):
            return io.BytesIO(found)
        if not isinstance(found, str) or not found:
            raise BrokenExampleError(self.key(row), NO_FILE, f"column {column}")
        if not is_inside(found):
            raise BrokenExampleError(self.key(row), OUTSIDE, found)
        return open_regular(self._file.parent / found)

    def _row(self, row: int, *, images: bool) -> dict[str, Any]:
        try:
            table = self._images if images else self._texts
            found: dict[str, Any] = table.slice(row, 1).to_pylist()[0] if table and table.num_columns else {}
        except _arrow_errors() as error:
            raise BrokenExampleError(self.key(row), UNREADABLE, printable(str(error), 120)) from error
        if table is None:
            raise BrokenExampleError(self.key(row), BOMB)
        return found

    @functools.cached_property
    def _column(self) -> str:
        return _image_column(_opened(self._file).schema_arrow, self._file)

    @functools.cached_property
    def _texts(self) -> Any:
        names = _opened(self._file).schema_arrow.names
        table = self._read([name for name in names if name.lower() in FIELDS and name != self._column])
        return None if table is None else table.combine_chunks()  # rows of many pieces are found slowly

    @functools.cached_property
    def _images(self) -> Any:
        return self._read([self._column])

    def _read(self, columns: list[str]) -> Any:
        """Columns of the group; ``None`` if they are much more than they should be, by their sizes or by what comes."""
        file = _opened(self._file, columns)
        group = file.metadata.row_group(self._number)
        leaves = [group.column(i) for i in range(group.num_columns)]
        wanted = [leaf for leaf in leaves if any(f"{leaf.path_in_schema}.".startswith(f"{name}.") for name in columns)]
        packed = min(sum(leaf.total_compressed_size for leaf in wanted), self._file.stat().st_size)
        most = _FREE_BYTES + _MOST_TIMES * packed
        if sum(max(leaf.total_uncompressed_size, leaf.num_values) for leaf in wanted) > most:
            return None
        types = _pyarrow_types()
        small = all(types.is_dictionary(t) or types.is_primitive(t) for t in map(_type_of(file), columns))
        batches, size = [], 0
        at_once = _SMALL_ROWS if small else _LARGE_ROWS
        for batch in file.iter_batches(at_once, row_groups=[self._number], columns=columns, use_threads=False):
            batches.append(batch)
            size += batch.nbytes
            if size > most:
                return None
        return _table(batches)


def _opened(file: Path, columns: Sequence[str] = ()) -> Any:
    """pyarrow's reader; it is made anew each time, so that no process shares one.

    Texts of ``columns`` that repeat are kept once; images are not looked at for that.
    """
    plain = _pyarrow().ParquetFile(file, memory_map=False)
    types, type_of = _pyarrow_types(), _type_of(plain)
    texts = [name for name in columns if types.is_string(type_of(name)) or types.is_large_string(type_of(name))]
    return _pyarrow().ParquetFile(file, memory_map=False, read_dictionary=texts) if texts else plain


def _type_of(file: Any) -> Callable[[str], Any]:
    return lambda name: file.schema_arrow.field(name).type


def _image_column(schema: Any, file: Path) -> str:
    """The column of images: bytes, records of bytes and path, or names of files."""
    types = _pyarrow_types()
    for field in schema:
        if types.is_binary(field.type) or types.is_large_binary(field.type):
            return str(field.name)
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return str(field.name)
    names = [str(field.name) for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
    if found := next((name for name in names if name.lower() in FILE_FIELDS), None):
        return found
    raise DataError(
        f"{file} has no images: expected a column of bytes, of records with bytes and path, or one called "
        f"{' or '.join(FILE_FIELDS)} with names of files beside it. It has: {', '.join(schema.names)[:300]}."
    )


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("parquet files need pyarrow: pip install 'flagai_altdiff[parquet]'") from error
    return pyarrow.parquet


def _table(batches: list[Any]) -> Any:
    import pyarrow

    return pyarrow.Table.from_batches(batches) if batches else pyarrow.table({})


def _pyarrow_types() -> Any:
    import pyarrow.types

    return pyarrow.types


def _arrow_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises of a damaged file; those of a bad value are ValueErrors."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, IndexError)
