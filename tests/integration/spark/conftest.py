"""One Spark for all tests of this folder: starting it takes seconds."""

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from cxr_training.spark.session import session
from support.spark import QUICK


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    with session("local[2]", conf=QUICK) as running:
        yield running
