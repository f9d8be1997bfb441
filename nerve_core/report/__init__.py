"""A run's figures in; a page that opens anywhere, JSON and CSV out; and two runs on one page."""

from .compare import write_comparison
from .data import Camera, Curve, Live, Picture, Presence, Published, Report, Score, SetScores
from .files import ReportError, read_report
from .page import write_page, write_report
from .pictures import save_picture

__all__ = [
    "Camera",
    "Curve",
    "Live",
    "Picture",
    "Presence",
    "Published",
    "Report",
    "ReportError",
    "Score",
    "SetScores",
    "read_report",
    "save_picture",
    "write_comparison",
    "write_page",
    "write_report",
]
