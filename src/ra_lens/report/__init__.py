"""One self-contained HTML file that shows a run: open it anywhere, offline, years later."""

from ra_lens.files import check_output
from ra_lens.report.page import Section, Table
from ra_lens.report.write import write_report

__all__ = ["Section", "Table", "check_output", "write_report"]
