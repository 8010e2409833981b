"""The folder of predictions: what counts as done, and what may not be mixed."""

from dataclasses import replace

import pyarrow as pa
import pytest

from cxr_training.errors import TrainingError
from cxr_training.spark.predictions import Job, count_errors, opened, write_part

JOB = Job(model="cxr 1.0", config_sha256="a", input_sha256="b", images=5, part_size=2)


def table(rows, reason=None):
    return pa.table({"error_reason": pa.array([reason] * rows, pa.string())})


def write_all(out):
    for part, rows in enumerate((2, 2, 1)):
        write_part(out, part, table(rows))


def test_a_new_folder_lacks_every_part(tmp_path):
    out = tmp_path / "deep" / "out"
    with opened(out, JOB) as missing:
        assert missing == [0, 1, 2]
        assert not (out / "_SUCCESS").exists()
        write_all(out)
    assert (out / "_SUCCESS").exists()
    with opened(out, JOB) as missing:
        assert missing == []


def test_a_run_that_failed_leaves_its_parts_and_is_not_done(tmp_path):
    with pytest.raises(RuntimeError), opened(tmp_path, JOB):
        write_part(tmp_path, 1, table(2))
        (tmp_path / "_unfinished-2").write_bytes(b"PAR1")
        raise RuntimeError
    assert not (tmp_path / "_SUCCESS").exists()
    with opened(tmp_path, JOB) as missing:
        assert missing == [0, 2]
        assert not (tmp_path / "_unfinished-2").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged", None])
def test_a_damaged_part_is_not_done(tmp_path, content):
    with opened(tmp_path, JOB):
        write_all(tmp_path)
    if content is None:
        write_part(tmp_path, 2, table(2))
    else:
        (tmp_path / "part-000002.parquet").write_bytes(content)
    with opened(tmp_path, JOB) as missing:
        assert missing == [2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "cxr 2.0", "config_sha256": "c"}, "another model;"),
        ({"input_sha256": "c", "images": 6}, "another input;"),
        ({"config_sha256": "c", "input_sha256": "c"}, "another model and input;"),
        ({"part_size": 3}, "another part size;"),
    ],
)
def test_predictions_of_another_job_stay_unless_they_may_go(tmp_path, change, named):
    with opened(tmp_path, JOB):
        write_all(tmp_path)
    other = replace(JOB, **change)
    with pytest.raises(TrainingError, match=named), opened(tmp_path, other):
        pass
    with opened(tmp_path, JOB) as missing:
        assert missing == []
    with opened(tmp_path, other, overwrite=True) as missing:
        assert missing == list(range(other.parts))
        assert not (tmp_path / "_SUCCESS").exists()


def test_overwriting_the_same_job_keeps_what_is_done(tmp_path):
    with opened(tmp_path, JOB):
        write_all(tmp_path)
    with opened(tmp_path, JOB, overwrite=True) as missing:
        assert missing == []


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    refused = pytest.raises(TrainingError, match="holds no predictions")
    with refused, opened(tmp_path, JOB, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_left_alone(tmp_path):
    (tmp_path / "out").write_text("all of it")
    refused = pytest.raises(TrainingError, match="holds no predictions")
    with refused, opened(tmp_path / "out", JOB, overwrite=True):
        pass


def test_a_run_that_ended_before_its_record_was_written(tmp_path):
    (tmp_path / "_cxr-score.json").touch()
    with opened(tmp_path, JOB) as missing:
        assert missing == [0, 1, 2]


def test_two_runs_at_once(tmp_path):
    refused = pytest.raises(TrainingError, match="Another run")
    with opened(tmp_path, JOB), refused, opened(tmp_path, JOB):
        pass


def test_errors_are_counted_over_all_parts(tmp_path):
    with opened(tmp_path, JOB):
        write_part(tmp_path, 0, table(2))
        write_part(tmp_path, 1, table(2, "empty"))
        write_part(tmp_path, 2, table(1, "damaged"))
        (tmp_path / "_unfinished-2").write_bytes(b"PAR1")
        assert count_errors(tmp_path) == {"damaged": 1, "empty": 2}


def test_a_part_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(TrainingError, match=r"^Cannot write to .*: No such file or directory\.$"):
        write_part(tmp_path / "missing", 0, table(1))
