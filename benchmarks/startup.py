"""What importing ra_lens and asking its command line for help cost, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import difference_spread, interleaved


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time `import torch`, `import torch, ra_lens`, and `ra-lens --help`."""

    def python(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    def shown() -> None:
        command = Path(sys.executable).with_name("ra-lens")
        subprocess.run([command, "--help"], check=True, capture_output=True)

    routes = {
        "import torch": lambda: python("import torch"),
        "import torch, ra_lens": lambda: python("import torch, ra_lens"),
        "import torch; from ra_lens import run_with_ra": lambda: python(
            "import torch; from ra_lens import run_with_ra"
        ),
        "import torch, transformer_lens": lambda: python("import torch, transformer_lens"),
        "ra-lens --help": shown,
    }
    rounds = 1 if quick else rounds
    times = interleaved(routes, rounds=rounds)
    base = times["import torch"]
    return {
        "title": "Start",
        "how": (
            "Fresh processes. The spread is that of the difference within a round. "
            f"Medians of {rounds} rounds, interleaved."
        ),
        "columns": ["what", "s", "over import torch, s", "spread, s"],
        "rows": [
            [
                name,
                t.median,
                t.median - base.median,
                difference_spread(t.seconds, base.seconds),
            ]
            for name, t in times.items()
        ],
    }
