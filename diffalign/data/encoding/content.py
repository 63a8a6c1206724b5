"""The digest of a large set's content from its columns: a million groups without a million objects."""

from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.shards import halves

LARGE = 2**16  # groups, from which on the content is computed from columns


def content_digest(columns: Columns) -> bytes:
    """Return a digest of 16 bytes of images, prompts, labels, rewards, weights, maps and sources of groups,
    in order.

    It does not depend on the division of the table into record batches.
    """
    digest = blake2b(digest_size=16)
    digest.update(_raw(columns.sizes, "<i8"))
    digest.update(_raw(_files(columns), "<u8"))
    for name in ("prompt", "dense"):
        _strings(digest, columns.column(name))
    for name in ("texts", "patches", "scores", "rewards", "time_labels"):
        column = columns.column(name)
        while pa.types.is_list(column.type):
            digest.update(_raw(pc.list_value_length(column).to_numpy(), "<i8"))
            column = pc.list_flatten(column)
        if column.type == pa.float64():
            digest.update(_raw(column.to_numpy(), "<f8"))
        elif column.type == pa.int8():
            digest.update(_raw(column.to_numpy(), "i1"))
        else:
            digest.update(_raw(pc.is_valid(column).to_numpy(), "u1"))
            digest.update(_raw(halves(column.drop_null()), "<u8"))
    digest.update(_raw(columns.weights, "<f8"))
    if columns.has_source.any():  # else as it was before there were any
        digest.update(_raw(columns.has_source, "u1"))
        digest.update(_raw(halves(pc.struct_field(columns.column("source").drop_null(), "content")), "<u8"))
    return digest.digest()


def _files(columns: Columns) -> np.ndarray:
    """Return (m, 2) the digests of the image files, picked in numpy: Arrow would copy all cells of images."""
    content = halves(pc.struct_field(pc.list_flatten(columns.whole.table["images"]), "content"))
    return content[columns.cells("images", *columns.every_image(np.arange(len(columns))))[:, 0]]


def _strings(digest: "blake2b", column: pa.ChunkedArray) -> None:
    lengths = pc.fill_null(pc.binary_length(column), -1)
    digest.update(_raw(lengths.to_numpy(), "<i8"))
    for chunk in column.drop_null().chunks:
        if len(chunk):
            _, offsets, values = chunk.buffers()
            bounds = np.frombuffer(offsets, np.int64, len(chunk) + 1, 8 * chunk.offset)
            if values is not None:
                digest.update(memoryview(values)[bounds[0] : bounds[-1]])


def _raw(values: np.ndarray, kind: str) -> bytes:
    return values.astype(kind).tobytes()
