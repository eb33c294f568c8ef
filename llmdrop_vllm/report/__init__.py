"""The page and the pictures of a sweep. matplotlib is imported when a report is written, not before."""

from llmdrop_vllm.report.write import write_report

__all__ = ["write_report"]
