"""Files of rows for the tests of the readers, and what is read of them."""

import bz2
import gzip
import json

import pyarrow as pa

from cordee.data.row import Broken
from cordee.data.rows import batches


def zst(content):
    with pa.BufferOutputStream() as buffer:
        with pa.CompressedOutputStream(buffer, "zstd") as stream:
            stream.write(content)
        return buffer.getvalue().to_pybytes()


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zst}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def numbered(count, first=0):
    return [{"n": number, "text": f"Row {number} ends here."} for number in range(first, first + count)]


def put(folder, files):
    """Write files, given by their names: bytes as they are, lists of rows as JSON lines."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else lines(content))
    return folder


def read(*files, size=1000):
    return [row for batch in batches(files, size, "data") for row in batch]


def found(*files):
    """The place and values of each row, or the place and what is wrong with it."""
    return [(row.place, row.values.problem if isinstance(row.values, Broken) else row.values) for row in read(*files)]
