"""The formulas of knockouts, against finite differences of a softmax and rows worked by hand."""

import torch

from ra_lens.collect import reversed_attention
from ra_lens.knockouts.predict import cut_map, cut_of_set, knockout_map, knockout_of_set


def _rows(n: int = 6, *, sharp: float = 1.0, sink: bool = False):
    """Patterns, gradients of a loss that is linear in them, and R~ by autograd, in float64."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, n, n, generator=generator, dtype=torch.float64) * sharp
    scores.requires_grad_()
    grad = torch.randn(2, 3, n, n, generator=generator, dtype=torch.float64)
    pattern = _softmax(scores, sink=sink)
    (pattern * grad).sum().backward()
    return scores.detach(), pattern.detach(), grad, scores.grad


def _softmax(scores: torch.Tensor, *, sink: bool = False) -> torch.Tensor:
    if not sink:
        return scores.softmax(dim=-1)
    return torch.cat([scores, torch.ones_like(scores[..., :1])], dim=-1).softmax(dim=-1)[..., :-1]


def test_a_row_worked_by_hand():
    pattern = torch.tensor([[0.5, 0.3, 0.2]])
    grad = torch.tensor([[1.0, 2.0, -1.0]])  # g = .5 + .6 − .2 = .9
    step = pattern * (grad - 0.9)  # .05, .33, −.38
    # Without key 0 the others become .6 and .4: 1.2 − .4 = .8, and .8 − .9 = −.1.
    torch.testing.assert_close(knockout_map(pattern, step)[0, 0], torch.tensor(-0.1))
    torch.testing.assert_close(cut_map(pattern, grad)[0], torch.tensor([-0.5, -0.6, 0.2]))
    both = torch.tensor([[True, True, False]])  # only key 2 is left: −1 − .9
    torch.testing.assert_close(knockout_of_set(pattern, step, both), torch.tensor([-1.9]))
    torch.testing.assert_close(cut_of_set(pattern, grad, both), torch.tensor([-1.1]))


def test_scores_of_minus_infinity_do_what_is_said_with_a_linear_loss():
    # A sink's share is what a row lacks to 1, which has few digits where the sink has next to none.
    for sink, sharp in ((False, 1.0), (False, 8.0), (False, 40.0), (True, 1.0), (True, 4.0)):
        scores, pattern, grad, step = _rows(sharp=sharp, sink=sink)
        found = knockout_map(pattern, step)
        for key in range(scores.shape[-1]):
            cut = scores.clone()
            cut[..., key] = -torch.inf
            change = ((_softmax(cut, sink=sink) - pattern) * grad).sum(dim=-1)
            torch.testing.assert_close(found[..., key], change)


def test_sets_of_edges_do_what_is_said_with_a_linear_loss():
    for sink in (False, True):
        scores, pattern, grad, step = _rows(sharp=4.0, sink=sink)
        edges = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.6
        edges[..., 0] = False  # something is left of every row
        cut = scores.masked_fill(edges, -torch.inf)
        change = ((_softmax(cut, sink=sink) - pattern) * grad).sum(dim=-1)
        torch.testing.assert_close(knockout_of_set(pattern, step, edges), change)
        plain = ((pattern * ~edges - pattern) * grad).sum(dim=-1)
        torch.testing.assert_close(cut_of_set(pattern, grad, edges), plain)


def test_one_edge_is_a_set_of_one():
    _, pattern, grad, step = _rows(sharp=10.0)
    for key in range(pattern.shape[-1]):
        edges = torch.zeros_like(pattern, dtype=torch.bool)
        edges[..., key] = True
        one = knockout_of_set(pattern, step, edges)
        torch.testing.assert_close(one, knockout_map(pattern, step)[..., key])
        torch.testing.assert_close(
            cut_of_set(pattern, grad, edges), cut_map(pattern, grad)[..., key]
        )


def test_saturated_rows_keep_their_digits_in_float32():
    for sharp in (10.0, 20.0):
        scores, _, grad, _ = _rows(sharp=sharp)
        pattern = scores.float().softmax(dim=-1)
        step = reversed_attention(pattern, grad.float(), 1.0)
        exact = knockout_map(scores.softmax(dim=-1), _rows(sharp=sharp)[3])
        assert float(pattern.max()) > 0.999
        torch.testing.assert_close(
            knockout_map(pattern, step).double(), exact, rtol=1e-3, atol=1e-4
        )


def test_what_cannot_be_cut_is_0_and_nothing_is_nan():
    pattern = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
    grad = torch.tensor([[3.0, 1.0, 2.0]]).expand(3, 3)
    step = reversed_attention(pattern[None, None], grad[None, None], 1.0)[0, 0]
    found = knockout_map(pattern, step)
    assert found[0].tolist() == [0.0, 0.0, 0.0]  # all that the row has
    assert found[1].tolist() == [0.0, 0.0, 0.0]  # padding
    assert found[2, 2] == 0
    every = torch.ones(3, 3, dtype=torch.bool)
    assert knockout_of_set(pattern, step, every).tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(found).all()
