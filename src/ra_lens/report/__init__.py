"""One self-contained HTML file that shows a run: open it anywhere, offline, years later.

`write_head_page` does so for one head. `inline_report` gives the same explorer for one cell of a
notebook.
"""

from ra_lens.files import check_output
from ra_lens.html import Table
from ra_lens.report.head_page import write_head_page
from ra_lens.report.inline import inline_report
from ra_lens.report.predictions import PatchedPrompt, Predictions, patched_predictions
from ra_lens.report.sections import Section
from ra_lens.report.write import write_report

__all__ = [
    "PatchedPrompt",
    "Predictions",
    "Section",
    "Table",
    "check_output",
    "inline_report",
    "patched_predictions",
    "write_head_page",
    "write_report",
]
