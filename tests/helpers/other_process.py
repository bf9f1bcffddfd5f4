"""Python in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def printed_by(code: str) -> str:
    """What a piece of code prints there."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    return done.stdout.strip()
