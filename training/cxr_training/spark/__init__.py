"""The long jobs on Apache Spark: many images to a manifest, and to predictions.

Each job runs the same functions as the single-machine path, spread over executors. Only this
package imports PySpark.
"""
