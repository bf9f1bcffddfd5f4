"""Other backward passes: against models written anew, on paper, and what they leave as it is."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch.nn import functional as F

from arch_models import has, write
from conformance import build
from conformance.configs import ARCHITECTURES, ENCODER_DECODERS, MASKED
from conformance.expectations import expected
from left_behind import changes, graphs, snapshot
from oracle import load_oracle, nll
from other_backward import OtherBackward
from ra_lens import RACache, run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import load_folder
from ra_lens.model.backward import Rewiring, softened
from ra_lens.steps import gradient_step
from refused import unchecked
from tiny_models import CASES, D_HEAD, KINDS, random_ids, relative

IDS, TARGETS = random_ids(2, 7, seed=5), [8, 20]
OTHERS = ("relp", "gim")
# By default each class with one of them; with --every-model all.
EITHER = {"gpt2": "relp", "llama": "gim", "opt": "relp"}
EACH = [
    pytest.param(*case, one, marks=[] if EITHER.get(case[0]) == one else pytest.mark.every_model)
    for case in CASES
    for one in OTHERS
]


def differences(model, oracle, backward, scale):
    """Of R, G, ∂L/∂z and the logits of every layer, from those of a model written anew."""
    other = OtherBackward(oracle, backward)
    maps, at_z, wanted = other.gradients(IDS, nll(*TARGETS))
    logits, ra = run_with_ra(
        model, IDS, target=TARGETS, backward=backward, vectors=["z", "z_grad"], return_logits="all"
    )
    found = [relative(logits, wanted)]
    seen = torch.ones(IDS.shape[1], IDS.shape[1]).tril()
    for layer, (by_score, pattern, by_pattern) in enumerate(maps):
        found.append(relative(ra["ra", layer], scale * by_score))
        found.append(relative(ra["pattern", layer], pattern))
        found.append(relative(ra["pattern_grad", layer] * seen, by_pattern * seen))
        found.append(relative(ra["z_grad", layer].flatten(2), at_z[layer]))
    return max(found)


@pytest.mark.parametrize("backward", OTHERS)
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_gradients_are_those_of_models_written_anew(arch, kind, backward, shared, reference):
    model = shared(arch, kind, torch.float64)
    assert differences(model, reference(arch), backward, 1 / math.sqrt(D_HEAD)) < 1e-6


@pytest.mark.every_model
@pytest.mark.parametrize("backward", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "arcee"])
def test_norms_of_queries_norms_behind_caps_and_squares(arch, kind, backward, tmp_path):
    """Qwen 3 normalises queries and keys, Gemma 2 what blocks give, Arcee squares a ReLU."""
    if not has(arch) or (arch != "qwen3" and kind == "HookedTransformer"):
        pytest.skip(f"no {arch} here")
    folder = write(arch, tmp_path)
    model = load_folder(folder, kind=kind, device="cpu", dtype=torch.float64)
    oracle = load_oracle(folder)
    attention = next(m for m in oracle.model.modules() if hasattr(m, "q_proj"))
    assert differences(model, oracle, backward, attention.scaling) < 1e-5


# Mixtures of experts, gates by a sigmoid, state-space layers, clips, and xIELU; all else has rules.
WITHOUT_RULES = [
    *["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text"],
    *["qwen3_5_moe_text", "olmo", "olmoe", "flex_olmo", "granitemoe"],
    *["granitemoehybrid", "granitemoehybrid_nope", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"],
    *["gpt_oss", "deepseek_v2", "deepseek_v3", "deepseek_v3_yarn", "ernie4_5_moe"],
    *["minimax_m2", "apertus", "afmoe", "jamba", "falcon_h1"],
    *["lfm2_moe", "jetmoe", "laguna", "llama4_text", "hrm_text"],
    *["phimoe"],
]


@pytest.mark.every_model
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_architectures_have_rules(name, tmp_path):
    """Of those whose maps are exact; there values and maps of a part are the same."""
    if "TransformerBridge" not in KINDS or not hasattr(transformers, ARCHITECTURES[name].model):
        pytest.skip(f"no {name} here")
    if expected(name, "TransformerBridge").status not in ("exact", "patches refused"):
        pytest.skip(f"no maps of {name} here")
    folder = build.write_folder(ARCHITECTURES[name], tmp_path)
    model = load_folder(folder, kind="TransformerBridge", device="cpu")
    ids, options = build.random_ids(2, 9), {"target": [5, 11]}
    if name in ENCODER_DECODERS:
        options["decoder_input"] = build.random_ids(2, 4)
    if name in MASKED:
        options["position"] = -1
    run_with_ra(model, ids, **options)
    logits, _ = run_with_ra(model, ids, **options)
    for backward in OTHERS:
        if name in WITHOUT_RULES:
            with pytest.raises(UnsupportedModel, match=f"backward='{backward}' has a rule for"):
                run_with_ra(model, ids, backward=backward, vectors=["z_grad"], **options)
            continue
        found, ra = run_with_ra(model, ids, backward=backward, **options)
        assert torch.equal(found, logits)
        _, last = run_with_ra(model, ids, backward=backward, layers=[-1], **options)
        layer = next(iter(last.layers))
        assert relative(last["ra", layer], ra["ra", layer]) < 1e-4


# ---- on paper -----------------------------------------------------------------------------------

X, Y = [0.5, -1.5, 2.0, 1.0], [1.0, 2.0, -1.0, 3.0]
W = [2.0, 1.0, 3.0, -1.0]  # the gradient at the result


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gelu(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))  # GELU is x times this


def tanh_gelu(x):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def written_out(x):
    inside = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))
    return 0.5 * x * (1 + torch.tanh(inside))


def centred(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


SIZE = math.sqrt(sum(x * x for x in X) / 4 + 1e-5)
MIDDLE = sum(X) / 4
SPREAD = math.sqrt(sum((x - MIDDLE) ** 2 for x in X) / 4 + 1e-5)
LEVEL = [(w - sum(W) / 4) / SPREAD for w in W]
# What is computed, and the gradient at X that RelP hands on for W at the result.
HELD = {
    "RMSNorm": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5), [w / SIZE for w in W]),
    "RMSNorm of TransformerLens": (
        lambda x: x / (x.pow(2).mean(-1, True) + 1e-5).sqrt(),
        [w / SIZE for w in W],
    ),
    "RMSNorm by a power": (
        lambda x: x * torch.pow(x.pow(2).mean(-1, True) + 1e-5, -0.5),
        [w / SIZE for w in W],
    ),
    "LayerNorm": (lambda x: F.layer_norm(x, (4,)), LEVEL),
    "LayerNorm with a gain": (
        lambda x: F.layer_norm(x, (4,), torch.tensor([0.5, 0.5, 0.5, 0.5]).double()),
        [v / 2 for v in LEVEL],
    ),
    "LayerNorm written out": (centred, LEVEL),
    "ReLU": (torch.relu, [w * (x > 0) for w, x in zip(W, X, strict=True)]),
    "squared ReLU": (
        lambda x: torch.relu(x).pow(2),
        [w * max(x, 0) for w, x in zip(W, X, strict=True)],
    ),
    "SiLU": (F.silu, [w * sigmoid(x) for w, x in zip(W, X, strict=True)]),
    "SiLU written out": (
        lambda x: x * torch.sigmoid(x),
        [w * sigmoid(x) for w, x in zip(W, X, strict=True)],
    ),
    "GELU": (F.gelu, [w * gelu(x) for w, x in zip(W, X, strict=True)]),
    "GELU by tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        [w * tanh_gelu(x) for w, x in zip(W, X, strict=True)],
    ),
    "GELU written out": (written_out, [w * tanh_gelu(x) for w, x in zip(W, X, strict=True)]),
    "gate": (
        lambda x: F.silu(x) * (torch.tensor(Y) * x),  # half for each factor
        [w * y * x * sigmoid(x) for w, x, y in zip(W, X, Y, strict=True)],
    ),
    "gate written out": (
        lambda x: written_out(x) * (torch.tensor(Y) * x),
        [w * y * x * tanh_gelu(x) for w, x, y in zip(W, X, Y, strict=True)],
    ),
    "cap": (
        lambda x: 3 * torch.tanh(x / 3),
        [w * (1 - math.tanh(x / 3) ** 2) for w, x in zip(W, X, strict=True)],
    ),
}


@pytest.mark.parametrize("what", HELD)
def test_what_relp_holds_constant_on_paper(what):
    function, wanted = HELD[what]
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    result = function(x * 1.0)
    Rewiring("relp", "toy").of([result])
    (found,) = torch.autograd.grad(result, x, torch.tensor(W, dtype=torch.float64))
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


def test_attention_of_gim_on_paper():
    """One query, q = 2, and two keys, (ln 9)/2 and 0: A = (.9, .1), softened (¾, ¼)."""
    q, k, v = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 1.0, 1.0))
    keys = torch.stack([k * math.log(9) / 2, k * 0]).reshape(1, 2, 1)
    values = torch.stack([v * 4, v * -4]).reshape(1, 2, 1)
    pattern = torch.bmm(q.reshape(1, 1, 1), keys.transpose(1, 2)).softmax(-1)
    result = torch.bmm(pattern, values)
    assert pattern.flatten().tolist() == pytest.approx([0.9, 0.1])
    rewiring = Rewiring("gim", "toy")
    rewiring.of([result])
    assert rewiring.patterns == 1
    at_q, at_k, at_v = torch.autograd.grad(result.sum(), [q, k, v])
    # G = (4, −4), and (¾, ¼) ⊙ (G − 2) = (1.5, −1.5) at the scores.
    assert float(at_q) == pytest.approx(1.5 * math.log(9) / 2 / 4)
    assert float(at_k) == pytest.approx(1.5 * 2 * math.log(9) / 2 / 4)
    assert float(at_v) == pytest.approx((0.9 * 4 - 0.1 * 4) / 2)
    assert softened(pattern).flatten().tolist() == pytest.approx([0.75, 0.25])
    assert softened(torch.zeros(2)).tolist() == [0, 0]  # a row of padding


def attention(x, made=lambda pattern: pattern):
    rows = torch.stack([x, x * x.new_tensor(Y)])[None]
    return torch.bmm(made(torch.bmm(rows, rows.mT).softmax(-1)), rows)


REFUSED = {
    "a gate by sigmoid": (lambda x: torch.sigmoid(x.flip(0)) * x, "MulBackward0, a product"),
    "a sigmoid": (torch.sigmoid, "SigmoidBackward0 in the graph of toy"),
    "a tanh that caps nothing": (lambda x: 2 * torch.tanh(x / 3), "TanhBackward0"),
    "a product": (lambda x: (x * 1) * (x * x.new_tensor(Y)), "MulBackward0, a product of two"),
    "a quotient": (lambda x: (x * 1) / (x + 5), "DivBackward0, a product of two"),
    "a square": (lambda x: x.pow(2), "PowBackward0"),
    "experts": (lambda x: x.softmax(-1) * x, "MulBackward0"),
    "a softmax without values": (lambda x: x.softmax(-1), "SoftmaxBackward0"),
    "two matrices": (lambda x: torch.bmm(x[None, None].mT, x[None, None]), "BmmBackward0"),
    "a clamp": (lambda x: x.clamp(-1, 1), "ClampBackward1"),
    "an edit of a pattern": (lambda x: attention(x, torch.sqrt), "BmmBackward0"),
}


@pytest.mark.parametrize("backward", OTHERS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_rule_is_refused(what, backward):
    function, name = REFUSED[what]
    result = function(torch.tensor(X, dtype=torch.float64, requires_grad=True) * 1.0)
    with pytest.raises(UnsupportedModel, match=rf"found {name}.*backward='{backward}' has a rule"):
        Rewiring(backward, "toy").of([result])


def test_a_part_of_a_softmax_is_refused_where_it_would_be_softened():
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)

    def sink(pattern):
        return torch.cat([pattern, pattern[..., :1] * 0], -1)[..., :2]

    Rewiring("relp", "toy").of([attention(x * 1.0, sink)])
    with pytest.raises(UnsupportedModel, match="SliceBackward0 between softmax and values"):
        Rewiring("gim", "toy").of([attention(x * 1.0, sink)])


# ---- in a run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "kind", "backward"), EACH)
def test_values_are_the_same_and_nothing_is_left(arch, kind, backward, fresh):
    model = fresh(arch, kind)
    run_with_ra(model, IDS, target=TARGETS)  # which shows the model's routes
    before = snapshot(model)
    logits, exact = run_with_ra(model, IDS, target=TARGETS)
    found, ra = run_with_ra(model, IDS, target=TARGETS, backward=backward)
    assert torch.equal(found, logits)
    assert torch.equal(ra.loss, exact.loss)
    assert torch.equal(ra.stack("pattern"), exact.stack("pattern"))
    assert relative(ra.stack("ra"), exact.stack("ra")) > 0.05
    options = {"target": TARGETS, "backward": backward}
    _, again = run_with_ra(model, IDS, recompute=True, **options)
    assert relative(again.stack("ra"), ra.stack("ra")) < 1e-5
    _, vectors = run_with_ra(model, IDS, vectors=True, batch_size=1, progress=False, **options)
    assert relative(vectors.stack("ra"), ra.stack("ra")) < 1e-5
    _, last = run_with_ra(model, IDS, layers=[1], **options)
    assert relative(last["ra", 1], ra["ra", 1]) < 1e-5
    assert changes(before, snapshot(model)) == {}
    assert graphs(model) == []
    _, exact_again = run_with_ra(model, IDS, target=TARGETS)
    assert torch.equal(exact_again.stack("ra"), exact.stack("ra"))


@pytest.mark.every_model
@pytest.mark.parametrize("backward", OTHERS)
@pytest.mark.parametrize(("arch", "kind"), [case for case in CASES if case[0] != "gptj"])
def test_padding_changes_nothing(arch, kind, backward, shared):
    model = shared(arch, kind)
    rows = [IDS[0].tolist(), IDS[1, :4].tolist()]
    for side in ("left", "right"):
        options = {"padding_side": side, "backward": backward, "progress": False}
        _, both = run_with_ra(model, rows, target=TARGETS, **options)
        for i, (row, target) in enumerate(zip(rows, TARGETS, strict=True)):
            _, one = run_with_ra(model, row, target=target, backward=backward)
            assert relative(both.norms("ra")[i], one.norms("ra")[0]) < 1e-4


@pytest.mark.parametrize("backward", ["relp", pytest.param("gim", marks=pytest.mark.every_model)])
def test_hooks_of_the_user_are_part_of_the_pass(backward, fresh):
    """What they multiply with is as if the weights behind it were multiplied."""
    kind = KINDS[0]
    model, other = fresh("llama", kind), fresh("llama", kind)
    names = {
        "HookedTransformer": "blocks.1.mlp.hook_post",
        "TransformerBridge": "blocks.1.mlp.out.hook_in",
    }
    hooks = [(names[kind], lambda value, hook: value * 0.5)]
    hooks.append(("blocks.1.attn.hook_pattern", lambda value, hook: value * 0.5))
    with torch.no_grad():
        block = other.blocks[1]
        for weight in (block.mlp, block.attn):
            for name in ("W_out", "W_O"):
                if hasattr(weight, name):
                    getattr(weight, name).mul_(0.5)
    options = {"target": TARGETS, "backward": backward, "vectors": ["z_grad"]}
    logits, hooked = run_with_ra(model, IDS, fwd_hooks=hooks, **options)
    wanted, ra = run_with_ra(other, IDS, **options)
    assert relative(logits, wanted) < 1e-6
    assert relative(hooked.stack("ra"), ra.stack("ra")) < 1e-5

    def squashed(value, hook):
        return torch.sigmoid(value)

    hooks = [("blocks.1.hook_resid_pre", squashed)]
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=r"found SigmoidBackward0.*or a hook"):
        run_with_ra(model, IDS, fwd_hooks=hooks, **options)
    assert changes(before, snapshot(model)) == {}


def test_gim_needs_every_pattern_and_relp_does_not(shared):
    model = shared("gpt2", KINDS[0])
    constant = [("blocks.1.attn.hook_pattern", lambda p, hook: torch.ones_like(p).tril() / 7)]
    options = {"target": TARGETS, "fwd_hooks": constant}
    run_with_ra(model, IDS, target=TARGETS)  # which shows the model's routes
    with pytest.raises(UnsupportedModel, match="softmax of 2 of 3 attention layers behind the lo"):
        run_with_ra(model, IDS, backward="gim", **options)
    _, ra = run_with_ra(model, IDS, backward="relp", **options)
    assert float(ra.norms("ra")[:, 1].abs().max()) == 0
    with pytest.raises(BadInput, match="backward='lrp'; give one of 'exact', 'relp', 'gim'"):
        unchecked(run_with_ra)(model, IDS, target=TARGETS, backward="lrp")


def test_a_cache_says_which_backward_pass_it_is_of(shared, tmp_path):
    model = shared("gpt2", KINDS[0])
    _, exact = run_with_ra(model, IDS, target=TARGETS)
    assert exact.info.backward == "exact"
    assert "backward" not in repr(exact)
    _, ra = run_with_ra(model, IDS, target=TARGETS, backward="relp", vectors=True)
    assert "backward: relp: gradients of other rules" in repr(ra)
    assert dict(ra.facts(0))["Backward"].endswith("not of the loss")
    ra.save(tmp_path / "ra.safetensors")
    loaded = RACache.load(tmp_path / "ra.safetensors")
    assert loaded.info.backward == loaded.apply_slice_to_batch_dim(0).info.backward == "relp"
    with pytest.raises(BadInput, match=r"maps of run_with_ra\(backward='relp'\).*a knockout does"):
        ra.knockout(queries=-1)
    with pytest.raises(BadInput, match="a step of gradient descent is made of such"):
        gradient_step(model, ra, "L1H1", eta=0.1)


def test_a_metric_is_differentiated_as_it_is(shared):
    """Whatever it does to the logits has no rule, and needs none."""
    model = shared("gpt2", KINDS[0], torch.float64)

    def metric(logits):
        return -logits[:, -1].softmax(-1)[torch.arange(2), torch.tensor(TARGETS)].log().sigmoid()

    _, ra = run_with_ra(model, IDS, metric=metric, backward="relp")
    _, of_target = run_with_ra(model, IDS, target=TARGETS, backward="relp")
    p = torch.exp(-of_target.loss)
    slope = p / (1 + p) ** 2  # of sigmoid(log p) = p / (1 + p), by log p
    assert relative(ra["ra", 1], of_target["ra", 1] * slope[:, None, None, None]) < 1e-6
