"""One self-contained HTML file that shows a run: open it anywhere, offline, years later."""

from ra_lens.files import check_output
from ra_lens.html import Table
from ra_lens.report.predictions import PatchedPrompt, Predictions, patched_predictions
from ra_lens.report.sections import Section
from ra_lens.report.write import write_report

__all__ = [
    "PatchedPrompt",
    "Predictions",
    "Section",
    "Table",
    "check_output",
    "patched_predictions",
    "write_report",
]
