"""The bands of a difference hash, and the thinning out of pairs: what needs no Spark to run."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cxr_training.data.grouping import HASH_BITS, NEAR_DUPLICATE_BITS
from cxr_training.spark.near import BANDS, band_keys, thin_out


def flip(hash_words, bits):
    octets = np.unpackbits(hash_words.view(np.uint8))
    octets[bits] ^= 1
    return np.packbits(octets).view(np.uint64)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def random_hashes(rng, rows):
    return rng.integers(0, 2**64, (rows, HASH_BITS // 64), dtype=np.uint64)


def test_each_bit_is_in_one_band(rng):
    (original,) = random_hashes(rng, 1)
    changed = np.stack([flip(original, [bit]) for bit in range(HASH_BITS)])
    differs = band_keys(changed) != band_keys(original[None])
    assert (differs.sum(axis=1) == 1).all()
    assert differs.sum(axis=0).min() == HASH_BITS // BANDS


@pytest.mark.parametrize("distance", [0, 1, NEAR_DUPLICATE_BITS - 1, NEAR_DUPLICATE_BITS])
def test_near_hashes_agree_in_enough_bands(rng, distance):
    originals = random_hashes(rng, 200)
    copies = np.stack(
        [flip(words, rng.choice(HASH_BITS, distance, replace=False)) for words in originals]
    )
    agreeing = (band_keys(originals) == band_keys(copies)).sum(axis=1)
    assert agreeing.min() >= BANDS - NEAR_DUPLICATE_BITS > 0


def components(pairs, nodes):
    left, right = pairs[["left", "right"]].to_numpy().T
    graph = coo_array((np.ones(len(pairs)), (left, right)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1]


def test_thinning_out_leaves_the_components_and_few_pairs(rng):
    pairs = pd.DataFrame(rng.integers(0, 300, (2000, 2)) // 7, columns=["left", "right"])
    (kept,) = thin_out(iter([pairs[:900], pairs[900:901], pairs[901:]]))
    assert len(kept) < len(np.unique(pairs))
    assert (components(kept, 50) == components(pairs, 50)).all()


def test_thinning_out_nothing():
    (kept,) = thin_out(iter([]))
    assert list(kept.columns) == ["left", "right"]
    assert kept.empty
