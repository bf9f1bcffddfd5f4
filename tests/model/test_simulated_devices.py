"""The simulated devices refuse what GPUs refuse, allow what they allow, and see every move."""

from __future__ import annotations

import pytest
import torch

from simulated_devices import Copies, Copy, simulated

REFUSED = {
    "a sum over devices": lambda x, y: x + y,
    "a product over devices": lambda x, y: x @ y.T,
    "a product with the host": lambda x, y: x @ torch.ones(4, 3),
    "a sum with the host": lambda x, y: x + torch.ones(3, 4),
    "numbers joined over devices": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "numbers joined with the host's": lambda x, y: torch.stack([x.sum(), torch.tensor(1.0)]),
    "an index on another device": lambda x, y: y[x > 0],
    "the host by an index of a device": lambda x, y: torch.ones(3, 4)[x > 0],
    "a choice over devices": lambda x, y: x.where(y > 0, 0.0),
    "a host's number changed by a device": lambda x, y: torch.ones(()).add_(x.sum()),
    "a gather": lambda x, y: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_gpus_refuse(what):
    with simulated() as (first, second, *_):
        x, y = torch.randn(3, 4).to(first), torch.randn(3, 4).to(second)
        with pytest.raises(RuntimeError, match=r"same device, but found \['(cpu|sim:0)', 'sim:"):
            REFUSED[what](x, y)
    with simulated() as (first, *_), pytest.raises(TypeError, match="move it first"):
        torch.ones(2, device=first).numpy()


def test_what_gpus_allow():
    with simulated() as (first, second, *_):
        host = torch.arange(12.0).reshape(3, 4)
        x = host.to(first)
        found = [
            x * torch.tensor(2.0),
            x[torch.tensor([2, 0])],
            x.where(x > 3, torch.tensor(0.0)),
            x.clone().index_put_((torch.tensor([1]),), torch.tensor(5.0)),
            torch.zeros_like(x).copy_(host),
            torch.arange(3, device=first) + torch.tensor([1, 2, 3], device=first),
        ]
        assert {str(value.device) for value in found} == {"sim:0"}
        wanted = host.clone()
        wanted[1] = 5.0
        assert torch.equal(found[3].to("cpu"), wanted)
        x[0].mul_(3)  # of a view, which is of the same memory
        assert x[0].tolist() == [0.0, 3.0, 6.0, 9.0]
        assert str(x.to(second).device) == "sim:1"
        assert x.to(first) is x


def test_a_backward_pass_goes_back_over_the_devices_and_every_move_is_seen():
    with simulated() as (first, second, *_):
        weights = torch.nn.Linear(4, 2).to(first)
        x = torch.randn(3, 4)
        with Copies() as copies:
            loss = weights(x.to(first)).to(second).square().sum()
            loss.backward()
        assert copies.made == [
            Copy("cpu", "sim:0", (3, 4), 48),
            Copy("sim:0", "sim:1", (3, 2), 24),
            Copy("sim:1", "sim:0", (3, 2), 24),
        ]
        assert str(weights.weight.grad.device) == "sim:0"
        plain = torch.nn.Linear(4, 2)
        plain.load_state_dict({n: p.to("cpu") for n, p in weights.state_dict().items()})
        plain(x).square().sum().backward()
        assert torch.allclose(weights.weight.grad.to("cpu"), plain.weight.grad)
    assert Copies.watching == []
