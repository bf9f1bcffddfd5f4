"""Attention sinks: found where heads rest on a quiet token, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ra_lens import RACache, load_demo_model, load_task
from ra_lens.collect import reversed_attention
from ra_lens.knockouts.read import rests
from ra_lens.knockouts.sinks import find_sinks, most_attended
from ra_lens.model import Site, Sites
from ra_lens.paths import read_maps
from ra_lens.run_info import RunInfo
from real_model import needs_real_model, real_model
from tiny_models import KINDS


def made(n: int, resting: dict[int, list[int]], heads: int = 16) -> Tensor:
    """Rows that look at the token before; those of `resting` at each key's heads look there."""
    found = torch.zeros(heads, n, n)
    for query in range(n):
        found[:, query, max(query - 1, 0)] += 0.4
        found[:, query, query] += 0.6
    for key, own in resting.items():
        for head in own:
            for query in range(key + 1, n):
                found[head, query] = 0.0
                found[head, query, key], found[head, query, query] = 0.8, 0.2
    assert torch.allclose(found.sum(dim=-1), torch.ones(()))
    return found


def norms(n: int, heads: int = 16, **loud: float) -> Tensor:
    found = torch.ones(heads, n) + 0.1 * torch.arange(heads)[:, None]
    for key, factor in loud.items():
        found[:, int(key.removeprefix("at"))] *= factor
    return found


def test_most_heads_must_rest_there_and_little_come_from_there() -> None:
    # Of 16 heads more than 8 where values are known, more than 12 (a quarter of them) where not.
    for n_resting, by_value, by_pattern in (
        (8, (), ()),
        (9, (0,), ()),
        (12, (0,), ()),
        (13, (0,), (0,)),
    ):
        pattern = made(8, {0: list(range(n_resting))})
        assert find_sinks(pattern, norms(8, at0=0.2)) == by_value
        assert find_sinks(pattern, norms(8, at0=0.45)) == by_value
        assert find_sinks(pattern, norms(8, at0=0.55)) == ()
        assert find_sinks(pattern, norms(8)) == ()
        assert find_sinks(pattern) == by_pattern


def test_a_sink_need_not_be_the_first_token() -> None:
    pattern = made(9, {3: list(range(16))})
    assert find_sinks(pattern) == (3,)
    assert find_sinks(pattern, norms(9, at3=0.1, at5=0.1)) == (3,)  # nobody rests on 5


def test_heads_may_rest_on_two_quiet_tokens() -> None:
    pattern = made(9, {0: list(range(7)), 1: list(range(7, 14))})
    assert find_sinks(pattern, norms(9, at0=0.2, at1=0.2)) == (0, 1)
    assert find_sinks(pattern, norms(9, at0=0.2)) == ()  # half as many rest on one
    assert find_sinks(pattern) == ()


def test_more_than_half_of_the_queries_of_a_head_must_rest() -> None:
    pattern = made(8, {0: list(range(16))})
    apart = made(8, {})
    for n_away, sink in ((3, (0,)), (4, ())):  # of seven queries after the first token
        some = pattern.clone()
        some[:, 8 - n_away :] = apart[:, 8 - n_away :]
        assert find_sinks(some) == sink


def test_three_queries_must_come_after() -> None:
    assert find_sinks(made(4, {0: list(range(16))})) == (0,)
    for n in (1, 2, 3):
        assert find_sinks(made(n, {0: list(range(16))})) == ()
        assert find_sinks(made(n, {0: list(range(16))}), norms(n, at0=0.1)) == ()
    assert find_sinks(made(7, {4: list(range(16))})) == ()


def test_few_heads_tell_nothing_and_a_row_that_looks_everywhere_alike_is_no_rest() -> None:
    for heads, sink in ((1, ()), (4, ()), (5, (0,)), (8, (0,))):
        assert find_sinks(made(8, {0: list(range(heads))}, heads)) == sink
    alike = torch.ones(16, 8, 8).tril()
    alike /= alike.sum(dim=-1, keepdim=True)
    assert most_attended(alike)[0].tolist() == [0] + 7 * [-1]
    assert find_sinks(alike) == find_sinks(alike, norms(8, at0=0.0)) == ()


def test_drawn_attention_has_none() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = 2 * torch.randn(12, 6, 6, generator=generator)
        scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
        assert find_sinks(scores.softmax(dim=-1)) == ()


def test_the_embedded_model_has_none() -> None:
    prompts = load_task("country-capital").split().prompts("test", shots=2, n=6)
    prompts += load_task("antonym").split().prompts("test", shots=0, n=6)
    texts = [prompt.text for prompt in prompts]
    model = load_demo_model()
    for front in (True, False):
        for follow in ("value_norm", "pattern"):
            for maps in read_maps(model, texts, follow=follow, prepend_bos=front):
                assert maps.sinks == ()


@needs_real_model
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model_rests_on_its_first_token(kind: str) -> None:
    model = real_model(kind)
    text = "I like Italy and France. I visited the city of"
    for front in (True, False, "<|endoftext|>"):
        for follow in ("value_norm", "pattern"):
            (maps,) = read_maps(model, text, follow=follow, prepend_bos=front)
            assert maps.sinks == (0,)
    # TransformerLens puts the chat token in front of one that is there, and heads rest on both.
    chat = "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n"
    assert read_maps(model, chat, follow="value_norm", prepend_bos=True)[0].sinks == (0, 1)


def test_top_edges_leave_out_where_heads_rest_unless_asked() -> None:
    # All 16 heads of the first prompt rest on its second token; the second prompt has padding.
    patterns = torch.stack([made(8, {1: list(range(16))}), made(8, {})])
    grads = torch.randn(patterns.shape, generator=torch.Generator().manual_seed(0))
    site = Site(0, "blocks.0.attn", 16, 16, 0.5)
    rows = (tuple("abcdefgh"), tuple("abcdef"))
    patterns[1, :, 6:], patterns[1, :, :, 6:] = 0.0, 0.0
    ra = RACache(sites=Sites({0: site}), info=RunInfo(str_tokens=rows, starts=(0, 0)))
    ra._put(0, "pattern", patterns)
    ra._put(0, "ra", reversed_attention(patterns, grads, 0.5))
    left, every = (
        [{edge.key for edge in edges} for edges in ra.top_edges(2000, bos=bos).by_example()]
        for bos in (False, True)
    )
    assert 1 in every[0]
    assert left == [every[0] - {1}, every[1]]
    assert (rests(ra), ra.top_edges(1).left_out) == ([(1,), ()], (("b",), ()))
    assert repr(ra.top_edges(3)).startswith("6 edges by knockout, but for those to “b”:")
    # What was put in front is one of them, wherever heads look.
    ra.info = replace(ra.info, prepended="a")
    assert (rests(ra), ra.top_edges(1).left_out) == ([(0, 1), (0,)], (("a", "b"), ("a",)))
    assert not {0, 1} & {edge.key for edge in ra.top_edges(2000).by_example()[0]}
