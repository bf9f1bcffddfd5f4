"""Vectors of a real language model in tokens: what both classes say of one prompt.

The prompt is that of the paper's Figure 6; R says less Italy and more France there.
"""

from __future__ import annotations

import pytest

from ra_lens import run_with_ra
from ra_lens.vocabulary import Vocabulary
from real_model import needs_real_model, real_model
from tiny_models import KINDS

PROMPT, PARIS, STRONGEST = "I like Italy and France. I visited the city of", " Paris", "L23H4"


@needs_real_model
@pytest.mark.parametrize("kind", KINDS)
def test_the_strongest_head_writes_italy_and_descent_takes_it_back(kind):
    model = real_model(kind)
    _, ra = run_with_ra(model, PROMPT, target=PARIS, vectors=True, prepend_bos="<|endoftext|>")
    read = Vocabulary(model).read(ra, STRONGEST, positions=-1, target=PARIS, k=10)
    assert " Italy" in {token.token for token in read.at(-1, "z").top}
    step = read.at(-1, "z_step")
    assert " Italy" in {token.token for token in step.bottom}
    assert step.rank < read.at(-1, "query").rank
    assert read.at(-1, "out_step").rank == 1
