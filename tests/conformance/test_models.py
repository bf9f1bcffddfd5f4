"""Every architecture and variant that TransformerLens loads: exact, or refused with the reason.

`python -m pytest tests/conformance --every-model` runs the whole matrix; a plain run takes the
architectures below.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from ra_lens.model import available_kinds

from .configs import ARCHITECTURES
from .expectations import expected, surprises
from .variants import VARIANTS

# GPT-2, Llama, OPT and GPT-J are what all the other tests run on.
REPRESENTATIVE = {
    "openai_gpt",  # no padding
    "gpt_neo",  # softmax scale 1, local windows
    "falcon_alibi",  # bias of positions
    "gemma2",  # softcap, windows, a scale of its own
    "gpt_oss",  # attention sinks, experts
    "deepseek_v3",  # compressed keys and values
    "afmoe",  # pattern only shown, gated
    "qwen3_5_text",  # hybrid, gated
    "bert_mlm",  # both directions
    "t5",  # encoder and decoder, cross-attention
    "bart",  # positions count padding on the left
    "jetmoe",  # patches refused
    "gpt2_noscale",  # other logits
    "phimoe",  # does not boot
    "zamba2",  # no pattern
}
REPRESENTATIVE_VARIANTS = {
    "rotary_grouped_query",
    "local_windows",
    "score_softcap",
    "bidirectional",
    "clip_qkv",
    "result",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by what is installed and by how much was asked for."""
    every = metafunc.config.getoption("--every-model", default=False)
    for argument, kind, names, some in (
        ("architecture", "TransformerBridge", ARCHITECTURES, REPRESENTATIVE),
        ("variant", "HookedTransformer", VARIANTS, REPRESENTATIVE_VARIANTS),
    ):
        if argument in metafunc.fixturenames:
            here = kind in available_kinds()
            chosen = [name for name in names if here and (every or name in some)]
            metafunc.parametrize(argument, chosen)


@pytest.mark.skipif(
    "TransformerBridge" not in available_kinds(), reason="no TransformerBridge before 3.0"
)
def test_architecture_is_as_expected_on_the_bridge(architecture: str) -> None:
    from .checks import check

    record = check(ARCHITECTURES[architecture]).to_dict()
    assert not surprises(record, expected(architecture, "TransformerBridge"))


@pytest.mark.skipif(
    "HookedTransformer" not in available_kinds(), reason="no HookedTransformer from 4.0 on"
)
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


def _trust_every_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ra_lens.run.padding_is_hidden", lambda *_: True)
    monkeypatch.setattr("ra_lens.run.watched", lambda *_: nullcontext())


@pytest.mark.parametrize(
    ("mistake", "noticed", "of"),
    [
        (_double_scale, "scale", ("gpt2", "standard")),
        (_forget_row_sums, "maps", ("gpt2", "standard")),
        (_patch_nothing, "patches", ("gpt2", "standard")),
        (_trust_every_mask, "padding", ("openai_gpt", "bidirectional")),
    ],
)
@pytest.mark.parametrize("kind", available_kinds())
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
