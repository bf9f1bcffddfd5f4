"""Long prompts: a layer's attention in blocks of query rows, beside whole maps.

python -m benchmarks.long_prompts 32768     # one run of so many tokens, and what it took
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.memory import LONG, apart, one
from ra_lens.model import available_kinds

_LENGTHS = (1024, 2048, 4096)
_VOCAB = 1000  # words, so that the unembedding does not hide what attention takes


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Peak memory and time of each length, each run in a process of its own."""
    shape = {"rotary": True, "n_vocab": _VOCAB, "n_layer": 2 if quick else 12}
    rows: list[list[Any]] = []
    for kind in available_kinds()[:1] if quick else available_kinds():
        for tokens in (32, 64) if quick else _LENGTHS:
            rows += [
                [
                    kind,
                    tokens,
                    route,
                    found["peak"] / 1e6,
                    found["estimate"] / 1e6,
                    found["seconds"],
                ]
                for route in LONG
                for found in [apart(kind, tokens, route, **shape, n_ctx=tokens)]
            ]
    return {
        "title": "Long prompts",
        "how": (
            "GPT-2 small's shape with rotary positions (GPT-NeoX), a vocabulary of "
            f"{_VOCAB:,} words, float32, one prompt, store='norms' and recompute=True. Resident "
            "memory at its highest during the run, less that of the loaded and warmed-up process; "
            "each run once, in a process of its own. Blocks as chosen: 67 million entries of a "
            "layer's map at a time, which is the whole map of short prompts."
        ),
        "columns": ["model", "tokens", "a layer's attention", "peak, MB", "estimated, MB", "s"],
        "rows": rows,
    }


if __name__ == "__main__":
    length = int(sys.argv[1])
    print(json.dumps(one("HookedTransformer", length, "blocks as chosen", {
        "rotary": True, "n_vocab": _VOCAB, "n_ctx": length,
    })))  # fmt: skip
