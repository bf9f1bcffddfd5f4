"""`python -m ra_lens.cli`."""

from ra_lens.cli import main

main()
