"""One run at a time per model: hooks of two would act in each other's passes."""

from __future__ import annotations

import threading

import pytest

from ra_lens import check_model, run_with_ra
from ra_lens.errors import UnsupportedModel
from ra_lens.model import as_lens
from tiny_models import CASES, KINDS, random_ids, relative

IDS, TARGET = random_ids(2, 6), 8


def target_nll(logits):
    return -logits[:, -1].log_softmax(-1)[:, TARGET]


class Elsewhere:
    """A run in another thread that waits in its metric until it is let go."""

    def __init__(self, model):
        self.inside, self.go, self.ra = threading.Event(), threading.Event(), None
        self.thread = threading.Thread(target=self.run, args=(model,))

    def run(self, model):
        def metric(logits):
            self.inside.set()
            assert self.go.wait(60)
            return target_nll(logits)

        _, self.ra = run_with_ra(model, IDS, metric=metric)

    def __enter__(self):
        self.thread.start()
        assert self.inside.wait(60)
        return self

    def __exit__(self, *_):
        self.go.set()
        self.thread.join()


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_second_thread_is_refused_and_the_first_gets_its_maps(arch, kind, shared):
    model = shared(arch, kind)
    _, wanted = run_with_ra(model, IDS, target=TARGET)
    needed = r"at work in another thread: one run at a time per model.*once for each thread"
    with Elsewhere(model) as first:
        for call in (
            lambda: run_with_ra(model, IDS, target=TARGET),
            lambda: run_with_ra(model, "w4 w5"),
            lambda: check_model(model, prompt="w4 w5"),
        ):
            with pytest.raises(UnsupportedModel, match=needed):
                call()
        lens = as_lens(model)
        with pytest.raises(UnsupportedModel, match=needed), lens.hooks([]):
            pass
    assert relative(first.ra.stack(), wanted.stack()) < 1e-5
    _, again = run_with_ra(model, IDS, target=TARGET)  # the model is free again
    assert relative(again.stack(), wanted.stack()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_threads_with_models_of_their_own_run_together(kind, shared, fresh):
    mine, other = shared("gpt2", kind), fresh("gpt2", kind)
    with Elsewhere(other) as first:
        _, ra = run_with_ra(mine, IDS, target=TARGET)
    assert relative(first.ra.stack(), ra.stack()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_inside_a_run_of_the_same_model_is_refused(kind, shared, fresh):
    model = shared("gpt2", kind)
    _, wanted = run_with_ra(model, IDS, target=TARGET)

    def metric(logits):
        run_with_ra(model, IDS, target=TARGET)
        return target_nll(logits)

    def hook(value, hook):
        run_with_ra(model, IDS, target=TARGET)

    needed = r"inside a run of the same model, by a metric or a hook: one run at a time per model"
    with pytest.raises(UnsupportedModel, match=needed):
        run_with_ra(model, IDS, metric=metric)
    with pytest.raises(UnsupportedModel, match=needed):
        run_with_ra(model, IDS, target=TARGET, fwd_hooks=[("blocks.1.hook_resid_post", hook)])
    assert relative(run_with_ra(model, IDS, target=TARGET)[1].stack(), wanted.stack()) < 1e-5
    # With another model that is no different from a run beside it.
    other = fresh("gpt2", kind)

    def of_two(logits):
        run_with_ra(other, IDS, target=TARGET)
        return target_nll(logits)

    assert relative(run_with_ra(model, IDS, metric=of_two)[1].stack(), wanted.stack()) < 1e-5
