"""`cxr spark manifest`: the same manifest as without Spark, and no near-duplicate missed."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from click.testing import CliRunner
from pyspark.sql import SparkSession

from cxr_training.data import assign_groups, generate_phantoms, read_manifest
from cxr_training.data.grouping import NEAR_DUPLICATE_BITS
from cxr_training.data_cli import data
from cxr_training.spark import near
from cxr_training.spark.near import find_near_duplicates, near_pairs
from support.bundles import encoded_image
from support.spark import run_spark

Bits = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Phantoms, and a set with everything that a manifest leaves out or joins."""
    root = tmp_path_factory.mktemp("sets")
    phantoms = generate_phantoms(
        root / "phantoms", patients_per_class=4, seed=2, size_range=(96, 128)
    )
    covid, normal = root / "set/COVID", root / "set/Normal"
    for folder in (covid, normal):
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.png").write_bytes(
                encoded_image(90 + 10 * number, seed=len(folder.name) + number)
            )
    copied = sorted((phantoms / "images").iterdir())[0]
    shutil.copy(copied, covid / f"copy{copied.suffix}")  # in two sets: both stay, in one group
    (covid / "again.png").write_bytes((covid / "0.png").read_bytes())  # byte-identical
    (normal / "conflict.png").write_bytes((covid / "1.png").read_bytes())  # under another label
    (normal / "broken.jpg").write_bytes(b"broken")
    (normal / "masks").mkdir()
    (normal / "masks/0.png").write_bytes(encoded_image())
    return [phantoms, root / "set"]


def test_agrees_row_for_row_with_the_single_machine(
    spark: SparkSession, folders: list[Path], tmp_path: Path
) -> None:
    alone, spread = tmp_path / "alone.parquet", tmp_path / "spread.parquet"
    expected = CliRunner().invoke(
        data, ["manifest", *map(str, folders), "--out", str(alone), "--json"]
    )
    result = run_spark("manifest", *folders, "--out", spread, "--json")
    assert result.exit_code == 0, result.output
    pd.testing.assert_frame_equal(read_manifest(spread), read_manifest(alone))
    report = json.loads(result.stdout)
    assert report | {"out": str(alone)} == json.loads(expected.stdout)
    assert report["excluded"] == {
        "byte-identical duplicate": 1,
        "byte-identical with another finding": 2,
        "segmentation mask": 1,
        "unreadable": 1,
    }
    assert report["cross_source_groups"] == 1


def family(rng: np.random.Generator, distances: list[int]) -> Bits:
    """A hash, and for each distance another that is just so far from it."""
    first = rng.integers(0, 2, 256, dtype=np.uint8)
    members = [first]
    for distance in distances:
        member = first.copy()
        member[rng.choice(256, distance, replace=False)] ^= 1
        members.append(member)
    return np.stack(members)


def words(bits: Bits) -> npt.NDArray[np.uint64]:
    return np.packbits(bits, axis=1).view(np.uint64)


def close_pairs(hashes: npt.NDArray[np.uint64]) -> set[tuple[int, int]]:
    """By comparing all pairs."""
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    left, right = np.nonzero(np.triu(distance <= NEAR_DUPLICATE_BITS, k=1))
    return set(zip(left.tolist(), right.tolist(), strict=True))


def test_no_pair_is_missed_and_none_is_made_up(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(8)
    around = [0, 1, 10, 18, 19, 20, 20, 21, 22, 30]
    families = [family(rng, around) for _ in range(20)]
    # Next to no content: most bands are empty, and hold most of these. Their buckets are cut.
    sparse = np.zeros((300, 256), dtype=np.uint8)
    for row in sparse:
        row[rng.choice(256, rng.integers(12, 40), replace=False)] = 1
    monkeypatch.setattr(near, "_BLOCK_ROWS", 40)
    hashes = words(np.concatenate([*families, sparse]))
    expected = close_pairs(hashes)
    assert len(expected) > 20 * 6
    found = near_pairs(spark, hashes).collect()
    assert {(row.left, row.right) for row in found} == expected
    # Without the choice of buckets every pair of empty bands would meet.
    assert len(found) < 26 * len(expected)


def test_groups_agree_with_all_pairs(spark: SparkSession) -> None:
    rng = np.random.default_rng(9)
    bits = [family(rng, [5, 15, 20, 25]) for _ in range(6)]
    bits += [np.zeros((4, 256), np.uint8), np.ones((3, 256), np.uint8)]  # blank: not compared
    bits += [bits[0][:2], bits[1][:1]]  # equal hashes of different files
    dhash = [row.tobytes().hex() for row in np.packbits(np.concatenate(bits), axis=1)]
    sha256 = [f"{number * 7 % 256:02x}" * 32 for number in range(len(dhash))]
    frame = pd.DataFrame({"patient": None, "sha256": sha256, "dhash": dhash})
    expected = assign_groups(frame)
    assert 6 + 7 <= expected.nunique() < len(frame)
    found = assign_groups(frame, lambda column: find_near_duplicates(spark, column))
    pd.testing.assert_series_equal(found, expected)


def test_no_hash_has_content(spark: SparkSession) -> None:
    left, right = find_near_duplicates(spark, pd.Series(["0" * 64, "f" * 64]))
    assert len(left) == len(right) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "is not a folder"),
        (["--layout", "cubist", "."], "Unknown layout 'cubist'"),
        (["--task", "astrology", "."], "Unknown task 'astrology'"),
        (["--master", "nowhere:7077", "."], "'nowhere:7077' is no Spark master"),
    ],
)
def test_a_mistake_is_one_sentence(
    spark: SparkSession, tmp_path: Path, arguments: list[str], says: str
) -> None:
    result = run_spark("manifest", *arguments, "--out", tmp_path / "m.parquet")
    assert result.exit_code == 1
    assert says in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "m.parquet").exists()
