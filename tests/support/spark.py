"""What the tests of the Spark jobs share."""

from click.testing import CliRunner, Result

from cxr_training.spark.cli import spark as spark_command

# Tests are short: what Spark and Java would compile does not pay for itself.
QUICK = {
    "spark.driver.extraJavaOptions": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.shuffle.partitions": "2",
}


def run_spark(*arguments: object) -> Result:
    """Run `cxr spark` in this process; it uses the session that is there."""
    return CliRunner().invoke(spark_command, [str(argument) for argument in arguments])
