"""Near-duplicates by locality-sensitive hashing: a join instead of all pairs, without a miss.

The bits of a difference hash are dealt out to `BANDS` bands. Two hashes that differ in at most t
bits differ in at most t bands, so they agree in the `BANDS` - t others (pigeonhole principle).
Hashes that agree in a band share a bucket, and only hashes within a bucket are compared.

Radiographs look alike, so a few buckets hold a large part of all hashes, and comparing within them
would be comparing all pairs. So there are more bands than needed, and each hash enters only the
t + 1 of its buckets with the fewest members. No pair is lost by that: of the buckets that two near
hashes share, there are at least `BANDS` - t; take the smallest. All the others that they share are
larger, so in either hash's list at least `BANDS` - t - 1 stand above it, and it is among the t + 1
smallest of both. (Prefix filtering, known from joins on set similarity.) A bucket that is large all
the same is cut into blocks, each of which another task compares with the whole.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as f
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cxr_training.data.grouping import (
    HASH_BITS,
    NEAR_DUPLICATE_BITS,
    Edges,
    informative_hashes,
)

# Five more than the 21 that 20 bits need. On 2,344 public radiographs 21 bands compare 13 % of all
# pairs, in buckets of up to 129 hashes; 26 bands 13 %, in buckets of up to 56.
BANDS = 26
_BLOCK_ROWS = 4096
_WORDS = ("w0", "w1", "w2", "w3")


def find_near_duplicates(spark: SparkSession, column: "pd.Series[str]") -> Edges:
    """Edges between rows whose hashes have content and are at most 20 bits apart.

    Agrees with :func:`cxr_training.data.grouping.near_duplicates` in what is connected; of pairs
    that follow from others, most are left out, so that the edges fit the driver.

    Args:
        spark: where to compare.
        column: difference hashes in hexadecimal.
    """
    rows, hashes = informative_hashes(column)
    if not len(rows):
        return rows, rows
    distinct, first, code = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    code = code.ravel()
    pairs = near_pairs(spark, distinct)
    edges = pairs.mapInPandas(thin_out, pairs.schema).toPandas()
    left, right = (rows[first[edges[side].to_numpy()]] for side in ("left", "right"))
    return np.concatenate([rows, left]), np.concatenate([rows[first[code]], right])


def near_pairs(
    spark: SparkSession, hashes: npt.NDArray[np.uint64], threshold: int = NEAR_DUPLICATE_BITS
) -> DataFrame:
    """All pairs of hashes that are at most `threshold` bits apart.

    Args:
        spark: where to compare.
        hashes: uint64 `[rows, 4]`.
        threshold: at most `BANDS` - 1.

    Returns:
        Columns `left` < `right`, row numbers. A pair may stand there several times.
    """
    words = pd.DataFrame(hashes.view(np.int64), columns=list(_WORDS))
    frame = spark.createDataFrame(words.assign(id=np.arange(len(words))))
    buckets = _smallest_buckets(frame, threshold + 1)
    members = buckets.join(frame, "id")
    # Each row stands once on the left, in its own block, and on the right once for each block
    # of its bucket: every pair meets once.
    left = _renamed(members.drop("blocks"), "l_")
    every_block = f.explode(f.sequence(f.lit(0), f.col("blocks") - 1))
    right = _renamed(members.withColumn("block", every_block).drop("blocks"), "r_")
    same_bucket = [f.col(f"l_{name}") == f.col(f"r_{name}") for name in ("band", "key", "block")]
    distance: Column = f.lit(0)
    for word in _WORDS:
        distance += f.bit_count(f.col(f"l_{word}").bitwiseXOR(f.col(f"r_{word}")))
    joined = left.join(right, [*same_bucket, f.col("l_id") < f.col("r_id")])
    return joined.where(distance <= threshold).select(
        f.col("l_id").alias("left"), f.col("r_id").alias("right")
    )


def band_keys(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The bits of each band, as a number.

    Band b has the bits b, b + `BANDS`, b + 2 `BANDS`, ... of the hash: from all over the image,
    because neighbouring bits are much alike, and in a black border all are.

    Args:
        hashes: uint64 `[rows, 4]`.

    Returns:
        int64 `[rows, BANDS]`.
    """
    octets = np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), HASH_BITS // 8)
    bits = np.unpackbits(octets, axis=1).astype(np.int64)
    bands = [bits[:, band::BANDS] for band in range(BANDS)]
    return np.stack([band @ (1 << np.arange(band.shape[1])) for band in bands], axis=1)


def _smallest_buckets(frame: DataFrame, number: int) -> DataFrame:
    """The `number` buckets of each hash with the fewest members, if it is not alone in them.

    Returns:
        Columns `id`, `band`, `key`, and `block` of the `blocks` of that bucket.
    """
    bucket = Window.partitionBy("band", "key")
    rank = Window.partitionBy("id").orderBy("members", "band")
    smallest = (
        frame.mapInPandas(_buckets, "id long, band int, key long")
        .withColumn("members", f.count("*").over(bucket))
        .withColumn("rank", f.row_number().over(rank))
        .where((f.col("rank") <= number) & (f.col("members") > 1))
    )
    blocks = f.ceil(f.col("members") / _BLOCK_ROWS)
    return smallest.select(
        "id", "band", "key", (f.col("id") % blocks).alias("block"), blocks.alias("blocks")
    )


def _renamed(frame: DataFrame, prefix: str) -> DataFrame:
    return frame.select([f.col(name).alias(prefix + name) for name in frame.columns])


def _buckets(frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """All buckets of each hash."""
    for frame in frames:
        keys = band_keys(frame[list(_WORDS)].to_numpy().view(np.uint64))
        yield pd.DataFrame(
            {
                "id": np.repeat(frame["id"].to_numpy(), BANDS),
                "band": np.tile(np.arange(BANDS, dtype=np.int32), len(frame)),
                "key": keys.ravel(),
            }
        )


def thin_out(frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Leave just enough pairs to connect what all pairs connect: fewer than there are hashes."""
    kept = pd.DataFrame({"left": [], "right": []}, dtype=np.int64)
    for frame in frames:
        pairs = pd.concat([kept, frame])
        nodes, ends = np.unique(pairs.to_numpy(), return_inverse=True)
        left, right = ends.reshape(-1, 2).T
        graph = coo_array((np.ones(len(pairs), dtype=bool), (left, right)), shape=(len(nodes),) * 2)
        _, component = connected_components(graph, directed=False)
        # `nodes` is sorted, so the first node of each component is its smallest.
        _, first = np.unique(component, return_index=True)
        star = pd.DataFrame({"left": nodes[first[component]], "right": nodes})
        kept = star[star["left"] != star["right"]]
    yield kept
