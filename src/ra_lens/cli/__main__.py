"""`python -m ra_lens.cli`."""

from __future__ import annotations

from ra_lens.cli import main

main()
