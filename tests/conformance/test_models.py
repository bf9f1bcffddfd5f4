"""Every architecture and variant that TransformerLens loads: exact, or refused with the reason.

`python -m pytest tests/conformance --every-model` runs the whole matrix; a plain run takes the
architectures below, without compatibility mode and half precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from ra_lens.model import available_kinds
from ra_lens.vectors import VectorCollector
from tiny_models import KINDS, every_model

from .configs import ARCHITECTURES
from .expectations import expected, surprises
from .variants import VARIANTS

# Of what test_architectures.py does not have.
REPRESENTATIVE = {
    "falcon_alibi",  # bias of positions
    "gemma2",  # softcap, windows, a scale of its own
    "qwen3_5_text",  # hybrid, gated
    "gpt2_noscale",  # other logits
    "phimoe",  # does not boot
    "zamba2",  # no pattern
}
REPRESENTATIVE_VARIANTS = {
    "rotary_grouped_query",
    "local_windows",
    "score_softcap",
    "clip_qkv",
}


def every(kind: str, names: Iterable[str], representative: set[str]) -> Any:
    """All that a class loads; what is not representative is left to CI."""
    chosen = names if kind in available_kinds() else ()
    left = [() if name in representative else pytest.mark.every_model for name in chosen]
    return [pytest.param(name, marks=marks) for name, marks in zip(chosen, left, strict=True)]


@pytest.mark.parametrize("architecture", every("TransformerBridge", ARCHITECTURES, REPRESENTATIVE))
def test_architecture_is_as_expected_on_the_bridge(
    architecture: str, request: pytest.FixtureRequest
) -> None:
    from .checks import check

    # Compatibility mode and half precision need further copies of the model: left to CI.
    quick = not request.config.getoption("--every-model")
    record = check(ARCHITECTURES[architecture], quick=quick).to_dict()
    assert not surprises(record, expected(architecture, "TransformerBridge"))


@pytest.mark.parametrize("variant", every("HookedTransformer", VARIANTS, REPRESENTATIVE_VARIANTS))
def test_variant_is_as_expected_on_the_hooked_transformer(variant: str) -> None:
    from .hooked import check_variant

    record = check_variant(variant).to_dict()
    assert not surprises(record, expected(variant, "HookedTransformer"))


MODULES = ("checks", "subject", "hooked")


def _double_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    from .subject import run_with_ra

    def wrong(*args: Any, **kwargs: Any) -> Any:
        logits, ra = run_with_ra(*args, **kwargs)
        for layer, site in ra.sites.items():
            ra.sites[layer] = replace(site, scale=2 * site.scale)
        return logits, ra

    for module in MODULES:
        monkeypatch.setattr(f"{__package__}.{module}.run_with_ra", wrong)


def _forget_row_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ra_lens.collect.reversed_attention", lambda a, g, scale: scale * a * g)


def _patch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("subject", "hooked"):
        monkeypatch.setattr(f"{__package__}.{module}.patch_hooks", lambda *_a, **_k: [])


def _cut_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__package__}.knockouts.knockout_hooks", lambda *_a, **_k: [])


def _foretell_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the keys that stay got nothing of what is cut.
    monkeypatch.setattr("ra_lens.knockouts.predict.knockout_map", lambda pattern, step: -step)


def _mix_up_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = VectorCollector._keep

    def wrong(self: Any, layer: int, kind: str, value: Any) -> None:
        keep(self, layer, kind, value.flip(1) if kind == "query_grad" else value)

    monkeypatch.setattr(VectorCollector, "_keep", wrong)


def _trust_every_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ra_lens.run.padding_is_hidden", lambda *_: True)
    monkeypatch.setattr("ra_lens.run.watched", lambda *_: nullcontext())


@pytest.mark.parametrize(
    ("mistake", "noticed", "of"),
    [
        (_double_scale, "scale", ("gpt2", "standard")),
        (_forget_row_sums, "maps", ("gpt2", "standard")),
        (_patch_nothing, "patches", ("gpt2", "standard")),
        (_cut_nothing, "knockouts: error", ("gpt2", "standard")),
        (_foretell_without_the_others, "knockouts: foretold", ("gpt2", "standard")),
        (_mix_up_queries, "vectors", ("gpt2", "standard")),
        (_trust_every_mask, "padding", ("openai_gpt", "bidirectional")),
    ],
)
@pytest.mark.parametrize("kind", [KINDS[-1], *every_model(*KINDS[:-1])])
def test_mistakes_are_noticed(
    mistake: Any, noticed: str, of: tuple[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .checks import check
    from .hooked import check_variant

    mistake(monkeypatch)
    bridge = kind == "TransformerBridge"
    record = check(ARCHITECTURES[of[0]], quick=True) if bridge else check_variant(of[1])
    assert record.status == "failing"
    assert any(failure.startswith(noticed) for failure in record.failures)
