"""Execute the notebooks of examples/ and write them with new outputs.

cd tests && python -m notebooks            # all of them
cd tests && python -m notebooks 1_quick    # those whose names begin so
"""

from __future__ import annotations

import sys
import time

from .execute import execute, write
from .files import NOTEBOOKS

for path in NOTEBOOKS:
    if path.name.startswith(tuple(sys.argv[1:]) or ("",)):
        start = time.perf_counter()
        write(execute(path), path)
        sys.stdout.write(f"{path.name}: {time.perf_counter() - start:.0f} s, ")
        sys.stdout.write(f"{path.stat().st_size / 1e6:.2f} MB\n")
