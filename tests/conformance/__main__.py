"""Run the whole matrix on the installed TransformerLens, keep the results, render docs/models.md.

`PYTHONPATH=tests:tests/helpers python -m conformance`, in the project's folder, ends with status 1
if anything is not as expected.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from rich.console import Console
from rich.progress import track

from ra_lens.model import available_kinds

from . import results
from .checks import check
from .configs import ARCHITECTURES
from .expectations import expected, surprises
from .hooked import check_variant
from .variants import VARIANTS


def main() -> int:
    """Run, write, and tell what was not as expected."""
    console = Console(stderr=True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    unexpected = 0
    for kind in available_kinds():
        bridge = kind == "TransformerBridge"
        names = list(ARCHITECTURES if bridge else VARIANTS)
        records: dict[str, dict[str, Any]] = {}
        for name in track(names, description=kind, console=console):
            record = check(ARCHITECTURES[name]) if bridge else check_variant(name)
            records[name] = record.to_dict()
            for surprise in surprises(records[name], expected(name, kind)):
                unexpected += 1
                console.print(f"{name}: {surprise}", markup=False, highlight=False)
        console.print(f"wrote {results.write(kind, records)}")
    results.PAGE.write_text(results.render(), encoding="utf-8")
    console.print(f"wrote {results.PAGE}; {unexpected} not as expected")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
