"""The report of a run: one HTML file that needs nothing else, and makes no request.

It holds figures, tables and plots; images only where :func:`write_report` is asked for them.
"""

from cxr_training.report.collect import Example, ReportData, RunPredictor, collect
from cxr_training.report.render import render, write_report

__all__ = ["Example", "ReportData", "RunPredictor", "collect", "render", "write_report"]
