"""Runs for people to read: records, pages, figures, comparisons."""

from fedssl.report.run_report import finish_report

__all__ = ["finish_report"]
