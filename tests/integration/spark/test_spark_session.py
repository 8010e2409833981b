"""What Spark finds on the machine, and what is said when a job fails."""

import os
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cxr_training.data import Record
from cxr_training.errors import TrainingError
from cxr_training.spark import manifest as manifest_module
from cxr_training.spark import session as session_module
from cxr_training.spark.manifest import build_manifest
from cxr_training.spark.session import session
from support.spark import run_spark


def fail_with(error: Exception) -> None:
    with session("local[2]") as running:

        def fail(_: int) -> None:
            raise error

        running.sparkContext.parallelize([0]).foreach(fail)


def test_java_comes_with_the_package(spark: SparkSession) -> None:
    assert (Path(os.environ["JAVA_HOME"]) / "bin/java").is_file()
    assert spark.sparkContext._jvm.java.lang.System.getProperty("java.home").endswith(
        "java-runtime"
    )


def test_our_own_error_on_an_executor_keeps_its_sentence(spark: SparkSession) -> None:
    with pytest.raises(TrainingError, match=r"^Too dark\.$"):
        fail_with(TrainingError("Too dark."))


def test_any_other_error_is_named_and_not_quoted(spark: SparkSession) -> None:
    with pytest.raises(TrainingError) as caught:
        fail_with(PermissionError(13, "Permission denied", "/data/jane-doe.png"))
    assert "The Spark job failed (PermissionError)" in str(caught.value)
    assert "jane" not in str(caught.value)


def test_a_folder_that_executors_do_not_see(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Listed here, and gone when the executors look.
    entry = Record(path=tmp_path / "gone/1.png", finding="COVID-19", source="gone")
    monkeypatch.setattr(manifest_module, "list_entries", lambda *_: {tmp_path / "gone": [entry]})
    with pytest.raises(TrainingError, match="An executor does not see"), session("local[2]"):
        build_manifest(spark, [tmp_path])


def test_a_java_home_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(session_module.SparkSession, "getActiveSession", lambda: None)
    with pytest.raises(TrainingError, match="there is no bin/java in it"), session("local[2]"):
        pass


@pytest.mark.parametrize("value", ["spark.executor.memory", "=4g"])
def test_a_property_without_key_or_value(value: str) -> None:
    result = run_spark("manifest", ".", "--conf", value)
    assert result.exit_code == 2
    assert "Give KEY=VALUE." in result.output
