"""The leak audit: what a split by image would leak, by which relation, and whose."""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from cxr_training.data import DataError, assign_groups, assign_splits, audit_split

RELATIONS = ("patient", "near_duplicate", "identical")


def made_up(relation: str, copies: int = 60) -> pd.DataFrame:
    """Pairs of images that are related in one way, and as many images without a relative."""
    rng = np.random.default_rng(5)
    rows = []
    for number in range(copies):
        first, unlike, alone = (rng.bytes(32) for _ in range(3))
        alike = bytes([first[0] ^ 0xFF]) + first[1:]
        hashes = {"patient": unlike, "near_duplicate": alike, "identical": first}
        patient = f"p:{number}" if relation == "patient" else None
        twin = 0 if relation == "identical" else 1
        rows += [
            row("a", "x", patient, first, f"{number} 0"),
            row("b", "y", patient, hashes[relation], f"{number} {twin}"),
            row("c", "x", f"q:{number}", alone, f"{number} 2"),
        ]
    frame = pd.DataFrame(rows)
    return frame.assign(group=assign_groups(frame))


def row(
    source: str, label: str, patient: str | None, dhash: bytes, image: str
) -> dict[str, object]:
    sha256 = hashlib.sha256(image.encode()).hexdigest()
    columns = ("source", "label", "patient", "dhash", "sha256")
    return dict(zip(columns, (source, label, patient, dhash.hex(), sha256), strict=True))


@pytest.mark.parametrize("relation", RELATIONS)
def test_each_relation_is_counted_under_its_name(relation):
    frame = made_up(relation)
    audit = audit_split(frame, seed=1)
    total = asdict(audit.total)
    # A tenth is tested, and of seven in ten of these the other half is trained on.
    assert total["test_images"] == pytest.approx(18, abs=1)
    assert 4 < total["any"] == total[relation] < 13
    assert all(
        not total[other] for other in {"patient", "near_duplicate", "identical"} - {relation}
    )
    assert audit.by_source["c"].any == 0
    assert audit.by_source["a"].any + audit.by_source["b"].any == pytest.approx(total["any"])
    assert sum(leak.test_images for leak in audit.by_label.values()) == pytest.approx(
        total["test_images"]
    )
    assert {example.relation for example in audit.examples} == {relation}


def test_examples_name_no_patient_and_tell_the_distance():
    audit = audit_split(made_up("near_duplicate"), seed=0)
    assert 1 <= len(audit.examples) <= 3
    for example in audit.examples:
        assert example.distance == 8
        assert {example.test_source, example.train_source} == {"a", "b"}
        assert len(example.test) == len(example.train) == 12
    document = json.dumps(asdict(audit_split(made_up("patient"), seed=0)))
    assert "p:" not in document


def test_a_chain_counts_as_a_relative_only():
    # Two patients, and between them a near-duplicate: the ends are related by the group alone.
    frame = made_up("near_duplicate", copies=30)
    frame["patient"] = [f"p:{number // 3 if number % 3 != 1 else f'own{number}'}"
                        for number in range(len(frame))]  # fmt: skip
    frame["group"] = assign_groups(frame)
    total = audit_split(frame, seed=2).total
    assert total.any > max(total.patient, total.near_duplicate)


def test_the_audit_repeats_and_does_not_depend_on_the_order():
    frame = made_up("identical")
    audit = audit_split(frame, seed=4)
    assert audit == audit_split(frame.sample(frac=1, random_state=1), seed=4)
    assert audit.seeds == [4, 5, 6, 7, 8]
    assert audit != audit_split(frame, seed=5)


def test_a_grouped_split_leaks_nothing():
    frame = made_up("patient")
    split = assign_splits(frame, seed=0)
    assert (split.groupby(frame["group"]).nunique() == 1).all()


def test_too_few_images():
    with pytest.raises(DataError, match="has only 2"):
        audit_split(made_up("patient", copies=2).query("label == 'y'"), seed=0)
