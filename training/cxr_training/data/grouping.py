"""Groups: images that must stay together, because one tells the answer for another."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HASH_BITS = 256
# Re-encoded and resized copies lie within 20 bits; pairs of different patients begin to appear
# in numbers above 25.
NEAR_DUPLICATE_BITS = 20
# A hash that is nearly all zeros or all ones comes from an image without content, such as a blank
# exposure. Any two of them are close, whatever they show. Radiographs set 57 to 164 bits.
MIN_INFORMATIVE_BITS = 32

_BLOCK_ROWS = 256
_GROUP_DIGITS = 16

Edges = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
NearDuplicates = Callable[["pd.Series[str]"], Edges]


def near_duplicates(column: "pd.Series[str]") -> Edges:
    """Pairs of rows whose hashes have content and are at most `NEAR_DUPLICATE_BITS` apart.

    Args:
        column: difference hashes in hexadecimal.

    Returns:
        Row numbers of the first and of the second image of each pair.
    """
    informative, hashes = informative_hashes(column)
    left, right = [], []
    for start in range(0, len(hashes), _BLOCK_ROWS):
        # Each pair is met once: a block against itself and all rows after it.
        block = hashes[start : start + _BLOCK_ROWS, None]
        distance = np.bitwise_count(block ^ hashes[None, start:]).sum(axis=2, dtype=np.uint16)
        near_block, near_rest = np.nonzero(distance <= NEAR_DUPLICATE_BITS)
        left.append(informative[near_block + start])
        right.append(informative[near_rest + start])
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *left]), np.concatenate([empty, *right])


def informative_hashes(
    column: "pd.Series[str]",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Row numbers of the hashes with content, and those hashes: uint64 `[rows, 4]`."""
    hashes = np.frombuffer(bytes.fromhex("".join(column)), dtype=np.uint64)
    hashes = hashes.reshape(len(column), HASH_BITS // 64)
    set_bits = np.bitwise_count(hashes).sum(axis=1)
    informative = np.flatnonzero(
        (set_bits >= MIN_INFORMATIVE_BITS) & (set_bits <= HASH_BITS - MIN_INFORMATIVE_BITS)
    )
    return informative, hashes[informative]


def assign_groups(
    frame: pd.DataFrame, near_duplicates: NearDuplicates = near_duplicates
) -> "pd.Series[str]":
    """Group images that share a patient or show the same radiograph, across all sources.

    A group is a connected component over three relations: the same patient; the same file bytes;
    difference hashes at most `NEAR_DUPLICATE_BITS` apart. Hashes with next to no content are
    not compared.

    Args:
        frame: columns `patient` (null where unknown), `sha256`, `dhash`.
        near_duplicates: finds the near-duplicates. Pairs that follow from others may be missing.

    Returns:
        Group ids on the frame's index. An id comes from the smallest SHA-256 in the group, so it
        does not depend on the order of the rows.
    """
    rows = len(frame)
    # Copies of one file are linked by its bytes; compared by hash, their pairs would be many.
    once = np.flatnonzero(~frame["sha256"].duplicated())
    near_left, near_right = near_duplicates(frame["dhash"].iloc[once])
    parts = [
        _same_value(frame["patient"], first_node=rows),
        _same_value(frame["sha256"], first_node=2 * rows),
        (once[near_left], once[near_right]),
    ]
    left, right = (np.concatenate(nodes) for nodes in zip(*parts, strict=True))
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(3 * rows, 3 * rows))
    _, component = connected_components(graph, directed=False)
    return _named(frame["sha256"], component[:rows])


def rename_groups(frame: pd.DataFrame) -> "pd.Series[str]":
    """Ids of the same groups, of what is left in them.

    Args:
        frame: columns `sha256`, `group`.

    Returns:
        As :func:`assign_groups`; an id depends on no image that has been left out since.
    """
    return _named(frame["sha256"], frame["group"])


def _named(
    sha256: "pd.Series[str]", groups: "pd.Series[str] | npt.NDArray[np.int32]"
) -> "pd.Series[str]":
    return sha256.groupby(groups).transform("min").str[:_GROUP_DIGITS].rename("group")


def _same_value(column: "pd.Series[str]", first_node: int) -> Edges:
    """Edges from each row to a node of its own for each value; null joins nothing."""
    codes, _ = pd.factorize(column)
    known = np.flatnonzero(codes >= 0)
    return known, codes[known] + first_node
