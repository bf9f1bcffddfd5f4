"""Attention patching: add scaled maps to the pattern, without touching weights (paper section 5.3).

    A' = A + scale · map

after the softmax, and not renormalised: rows of R sum to 0, so rows of A' still sum to 1; with a
forward pattern added they do not. RA's scale is negative, a descent step. Two variants stay
attention: `renormalise=True` and `at="scores"` (see `ra_lens.patching.hooks`).

    hooks.py      the `(name, hook)` pairs, and what they do to the pattern
    place.py      where a map lies in a pattern of another length, under padding and caches
    through_z.py  the same addition where an edit of the pattern is discarded
    mean.py       maps averaged over examples
    masking.py    heads that write nothing
"""

from ra_lens.head_names import Heads
from ra_lens.patching.hooks import HookPairs, Where, patch_hooks
from ra_lens.patching.place import Align, Rows

__all__ = ["Align", "Heads", "HookPairs", "Rows", "Where", "patch_hooks"]
