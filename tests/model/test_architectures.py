"""Encoder-decoders, models that read both ways, gates, values elsewhere: maps and patches."""

from __future__ import annotations

import copy

import pytest
import torch

import arch_models
from arch_models import D_VOCAB, MASK, PAD, open_model
from conformance.pieces import D_HEAD
from ra_lens import RACache, get_ra_caching_hooks, patch_hooks, run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import as_lens, load_folder
from ra_lens.patching.masking import mask_hooks
from ra_lens.targets import sequence_nll
from tiny_models import KINDS, relative

BRIDGE = "TransformerBridge"
pytestmark = pytest.mark.skipif(BRIDGE not in KINDS, reason="no TransformerBridge here")

POS, TARGETS = 7, [5, 11]
IDS = torch.randint(0, MASK, (2, POS), generator=torch.Generator().manual_seed(0))
DECODER = torch.tensor([[PAD, 3, 4, 9], [PAD, 8, 2, 1]])
TWO_SIDED = ("t5", "bart")
SITES = [
    ("encoder_blocks.0.attn", "encoder 0"),
    ("encoder_blocks.1.attn", "encoder 1"),
    ("decoder_blocks.0.self_attn", "decoder 0"),
    ("decoder_blocks.0.cross_attn", "decoder 0 cross"),
    ("decoder_blocks.1.self_attn", "decoder 1"),
    ("decoder_blocks.1.cross_attn", "decoder 1 cross"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = {}

    def get(arch):
        if not arch_models.has(arch):
            pytest.skip(f"this transformers has no {arch}")
        if arch not in folders:
            folders[arch] = arch_models.write(arch, tmp_path_factory.mktemp(arch))
        return folders[arch]

    return get


@pytest.fixture(scope="module")
def both(written):
    """`both(arch)`: the bridge and the Hugging Face model beside it."""
    loaded = {}

    def get(arch):
        if arch not in loaded:
            model = load_folder(written(arch), kind=BRIDGE, device="cpu")
            reference = open_model(arch, written(arch))
            loaded[arch] = model, reference
        model, reference = loaded[arch]
        if arch == "t5":
            with torch.no_grad():
                try:
                    model(IDS)
                except ValueError:
                    pytest.skip("this TransformerLens cannot run T5 of this transformers")
        return model, reference

    return get


def inputs_of(arch):
    return {"decoder_input": DECODER} if arch in TWO_SIDED else {}


def hf_inputs_of(arch):
    return {"decoder_input_ids": DECODER} if arch in TWO_SIDED else {}


def last_nll(logits):
    return -sum(logits[i, -1].log_softmax(-1)[t] for i, t in enumerate(TARGETS))


EXACT = ("bert", "t5", "bart", "gemma4", "afmoe", "gpt_oss", "bitnet", "gpt_neo", "openai_gpt")
EXACT += ("deepseek_v3",)


@pytest.mark.parametrize("arch", [*EXACT, "jetmoe"])
def test_maps_are_the_gradients_of_hugging_faces_scores(arch, both):
    model, reference = both(arch)
    gradients, patterns = reference.score_gradients(IDS, last_nll, **hf_inputs_of(arch))
    position = -1 if arch == "bert" else None
    for _ in range(2):  # the second run knows the route
        _, ra = run_with_ra(model, IDS, target=TARGETS, position=position, **inputs_of(arch))
        assert len(ra.layers) == len(gradients)
        for layer, gradient, pattern in zip(ra.layers, gradients, patterns, strict=True):
            found = ra["ra", layer] / ra.scale[layer]
            assert relative(found, gradient) < 1e-5
            assert relative(ra["pattern", layer], pattern) < 1e-5


@pytest.mark.parametrize("arch", [*EXACT, "jetmoe"])
def test_a_run_leaves_no_graph_on_any_module_and_the_model_can_be_copied(arch, both):
    model, _ = both(arch)
    position = -1 if arch == "bert" else None
    run_with_ra(model, IDS, target=TARGETS, position=position, **inputs_of(arch))
    kept = [
        (type(module).__name__, name)
        for module in (*torch.nn.Module.modules(model), *model.original_model.modules())
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    assert kept == []
    again = copy.deepcopy(model)
    with torch.no_grad():
        inputs = inputs_of(arch)
        assert torch.equal(again(IDS, **inputs), model(IDS, **inputs))


@pytest.mark.parametrize("arch", ["bloom", "mpt"])
def test_an_mlp_that_adds_to_the_residual_stream_itself_is_read_where_answers_are(arch, both):
    model, reference = both(arch)
    answers = torch.tensor([[7, 9, 2], [4, 6, 1]])
    read = torch.cat([IDS, answers], dim=1)

    def mean_nll(logits):
        chosen = logits[:, POS - 1 : -1].log_softmax(-1).gather(-1, answers[..., None])
        return -chosen.squeeze(-1).mean(dim=1).sum()

    gradients, _ = reference.score_gradients(read, mean_nll)
    _, ra = run_with_ra(model, IDS, target=sequence_nll(answers.tolist()))
    for layer, gradient in enumerate(gradients):
        assert relative(ra["ra", layer] / ra.scale[layer], gradient) < 1e-5


@pytest.mark.parametrize("kind", ["ra", "pattern"])
@pytest.mark.parametrize("arch", [a for a in EXACT if a != "gpt_oss"])
def test_a_map_added_is_added_to_hugging_faces_pattern(arch, kind, both):
    model, reference = both(arch)
    position = -1 if arch == "bert" else None
    _, ra = run_with_ra(model, IDS, target=TARGETS, position=position, **inputs_of(arch))
    maps = {i: 0.5 * ra[kind, i] * ra["pattern", i].norm() / ra[kind, i].norm() for i in ra.layers}
    for value in maps.values():  # all heads alike would vanish where a norm comes after W_O
        value[:, 1::2] *= -0.5
    deltas = dict(enumerate(maps.values()))
    plain = reference.logits(IDS, **hf_inputs_of(arch)).log_softmax(-1)
    wanted = reference.logits(IDS, pattern_deltas=deltas, **hf_inputs_of(arch)).log_softmax(-1)
    hooks = patch_hooks(maps, ra.sites, scale=1.0)
    with torch.no_grad():
        found = model.run_with_hooks(IDS, fwd_hooks=hooks, **inputs_of(arch)).log_softmax(-1)
    assert relative(found - plain, wanted - plain) < 1e-3
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("arch", "scale"), [("bert", D_HEAD**-0.5), ("gpt_neo", 1.0), ("openai_gpt", D_HEAD**-0.5)]
)
def test_scale_is_the_factor_between_products_and_scores(arch, scale, both):
    model, _ = both(arch)
    seen = {}
    names = [f"blocks.1.attn.{name}" for name in ("hook_q", "hook_k", "hook_pattern")]
    with torch.no_grad():
        model.run_with_hooks(
            IDS, fwd_hooks=[(n, lambda x, hook, n=n: seen.update({n: x.detach()})) for n in names]
        )
    q, k, pattern = (seen[name] for name in names)
    q, k = (t.reshape(2, POS, 4, D_HEAD) for t in (q, k))
    products = torch.einsum("bqhd,bkhd->bhqk", q, k)
    # log A = S − log Z(row): within a row, against its own first entry that is not masked.
    inside = torch.ones(POS, POS).tril().bool() & ~torch.ones(POS, POS).tril(-4).bool()
    inside = torch.ones(POS, POS).bool() if arch == "bert" else inside
    first = torch.arange(POS).sub(3).clamp(min=0) if arch != "bert" else torch.zeros(POS).long()
    index = first[None, None, :, None].expand(2, 4, POS, 1)
    ours = scale * (products - products.gather(-1, index))
    theirs = pattern.log() - pattern.log().gather(-1, index)
    assert relative(ours[..., inside], theirs[..., inside]) < 1e-4
    assert as_lens(model).sites[1].scale == pytest.approx(scale, rel=1e-6)


# ---- encoder-decoders ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", TWO_SIDED)
def test_sites_say_where_they_are_and_maps_are_as_long_as_what_they_read(arch, both, tmp_path):
    model, _ = both(arch)
    _, ra = run_with_ra(model, IDS, target=TARGETS, decoder_input=DECODER)
    assert [(s.prefix, s.label) for s in ra.sites.values()] == SITES
    shapes = [(POS, POS)] * 2 + [(4, 4), (4, POS)] * 2
    assert [tuple(ra["ra", i].shape[-2:]) for i in ra.layers] == shapes
    assert torch.equal(ra["decoder_blocks.1.cross_attn.hook_ra"], ra["ra", -1])
    upper = [float(ra["pattern", i].triu(1).sum()) > 0.1 for i in ra.layers]
    assert upper == [True, True, False, True, False, True]
    assert [s.causal for s in ra.sites.values()] == [False, False, True, False, True, False]
    ra.save(tmp_path / "maps.safetensors")
    again = RACache.load(tmp_path / "maps.safetensors")
    assert again.sites == ra.sites
    assert (
        again.info.decoder_tokens
        == ra.info.decoder_tokens
        == tuple(("<pad>", *(f"w{int(i)}" for i in row[1:])) for row in DECODER)
    )
    assert torch.equal(again["ra", 3], ra["ra", 3])
    with pytest.raises(BadInput, match=r"different shapes.*layer by layer"):
        ra.stack()
    assert ra.norms().shape == (2, 6, 4)


@pytest.mark.parametrize("arch", TWO_SIDED)
def test_vectors_lie_where_the_tokens_of_their_side_do(arch, both):
    # The encoder's prompts have another length than what the decoder reads, and padding.
    model, _ = both(arch)
    short = IDS[1, :-2].tolist()
    rows = torch.tensor([IDS[0].tolist(), [*short, PAD, PAD]])
    mask = torch.ones_like(rows)
    mask[1, -2:] = 0
    options = {"decoder_input": DECODER, "target": TARGETS, "vectors": True}
    _, ra = run_with_ra(model, rows, attention_mask=mask, **options)
    options = {"decoder_input": DECODER[1:], "target": TARGETS[1], "vectors": True}
    _, alone = run_with_ra(model, torch.tensor([short]), **options)
    cross = [layer for layer, site in ra.sites.items() if site.cross]
    for layer in cross:
        for name in ("key", "value", "key_grad", "value_grad", "key_in"):
            assert ra[name, layer].shape[1] == POS
            assert alone[name, layer].shape[1] == len(short)
            assert relative(ra[name, layer][1, : len(short)], alone[name, layer][0]) < 2e-5, name
            assert not ra[name, layer][1, len(short) :].any()
        for name in ("query", "query_grad", "z_grad", "query_in", "attn_out_grad"):
            assert ra[name, layer].shape[1] == DECODER.shape[1]
            assert relative(ra[name, layer][1], alone[name, layer][0]) < 2e-5, name
    assert cross


@pytest.mark.parametrize("arch", TWO_SIDED)
def test_answers_are_teacher_forced_in_the_decoder(arch, both):
    model, reference = both(arch)
    answers = [[7, 9, 2], [4, 6, 1]]
    start = torch.full((2, 1), PAD)
    read = torch.cat([start, torch.tensor(answers)], dim=1)

    def mean_nll(logits):
        chosen = logits[:, :3].log_softmax(-1).gather(-1, torch.tensor(answers)[..., None])
        return -chosen.squeeze(-1).mean(dim=1).sum()

    gradients, _ = reference.score_gradients(IDS, mean_nll, decoder_input_ids=read)
    _, ra = run_with_ra(model, IDS, target=sequence_nll(answers))
    for layer, gradient in enumerate(gradients):
        assert relative(ra["ra", layer] / ra.scale[layer], gradient) < 1e-5
    text = [" ".join(f"w{i}" for i in row) for row in answers]
    _, same = run_with_ra(model, IDS, target=text)
    assert torch.equal(same["ra", 3], ra["ra", 3])
    _, one = run_with_ra(model, IDS[:1], target=" w7")
    _, spelled = run_with_ra(model, IDS[:1], target=7, decoder_input=start[:1])
    assert torch.equal(one["ra", 3], spelled["ra", 3])
    _, after_words = run_with_ra(model, IDS[:1], target=2, decoder_input="w7 w9")
    _, after_ids = run_with_ra(model, IDS[:1], target=2, decoder_input=read[:1, :3])
    assert torch.equal(after_words["ra", 5], after_ids["ra", 5])


@pytest.mark.parametrize("arch", TWO_SIDED)
def test_an_examples_maps_do_not_depend_on_the_padding_of_its_batch(arch, both):
    model, _ = both(arch)
    texts = [" ".join(f"w{i}" for i in row) for row in ([3, 4, 5, 6, 7], [8, 9, 10])]
    answers = ["w2", "w5 w6 w7"]
    model.tokenizer.padding_side = "left"  # BART's positions would shift: padded on the right
    _, ra = run_with_ra(model, texts, target=answers, prepend_bos=False)
    for i, (prompt, answer) in enumerate(zip(texts, answers, strict=True)):
        objective = sequence_nll([answer])
        _, alone = run_with_ra(model, [prompt], target=objective, prepend_bos=False)
        for layer in alone.layers:
            wanted = alone["ra", layer][0]
            rows, columns = wanted.shape[-2:]
            found = ra["ra", layer][i, :, :rows, :columns]
            assert (found - wanted).norm() <= 1e-4 * wanted.norm()  # one token attends to itself: 0
            rest = ra["ra", layer][i].clone()
            rest[:, :rows, :columns] = 0
            assert not bool(rest.any())


@pytest.mark.parametrize("arch", TWO_SIDED)
def test_frozen_parameters_means_and_hooks_of_ones_own_backward(arch, both):
    model, _ = both(arch)
    _, wanted = run_with_ra(model, IDS, target=TARGETS, decoder_input=DECODER)
    ra, fwd_hooks, bwd_hooks = get_ra_caching_hooks(model)
    with model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
        last_nll(model(IDS, decoder_input=DECODER)).backward()
    model.zero_grad()
    _, mean = run_with_ra(model, IDS, target=TARGETS, decoder_input=DECODER, store="mean")
    for layer in wanted.layers:
        assert relative(ra["ra", layer], wanted["ra", layer]) < 1e-5
        by_hand = wanted["ra", layer].mean(dim=0)
        assert relative(mean.mean()["ra", layer], by_hand) < 1e-6
        assert relative(wanted.mean()["ra", layer], by_hand) < 1e-6


def test_what_does_not_apply_to_encoder_decoders_is_refused(both):
    model, _ = both("bart")
    _, ra = run_with_ra(model, IDS, target=TARGETS, decoder_input=DECODER)
    with pytest.raises(BadInput, match=r"align='left'.*cross-attention.*decoder 0 cross"):
        ra.mean().patch_hooks(scale=1.0, align="left")
    with pytest.raises(BadInput, match=r"attention_mask.*encoder's tokens or the decoder's"):
        ra.mean().patch_hooks(scale=1.0, attention_mask=torch.ones(2, POS))
    hooks = ra.mean().patch_hooks(scale=1.0, layers=3)
    with (
        pytest.raises(BadInput, match=r"2 tokens of the decoder and 7 of .*for 4 and 7.*lengths"),
        torch.no_grad(),
    ):
        model.run_with_hooks(IDS, fwd_hooks=hooks, decoder_input=DECODER[:, :2])
    with pytest.raises(BadInput, match=r"decoder_input of 3 rows for 2 prompts"):
        run_with_ra(model, IDS, target=3, decoder_input=torch.full((3, 2), 4))
    with pytest.raises(UnsupportedModel, match=r"is an encoder-decoder.*run_with_ra gives maps"):
        as_lens(model).forward(IDS, torch.ones_like(IDS).bool())
    llama, _ = both("llama")
    with pytest.raises(BadInput, match=r"decoder_input, but .* has no decoder"):
        run_with_ra(llama, IDS, target=3, decoder_input=DECODER)


# ---- both directions -----------------------------------------------------------------------------


def test_masked_models_predict_the_token_at_the_mask(both):
    model, reference = both("bert")
    ids = IDS.clone()
    ids[0, 2], ids[1, 4] = MASK, MASK

    def at_masks(logits):
        log_p = logits.log_softmax(-1)
        return -log_p[0, 2, TARGETS[0]] - log_p[1, 4, TARGETS[1]]

    gradients, _ = reference.score_gradients(ids, at_masks)
    _, ra = run_with_ra(model, ids, target=TARGETS)
    _, placed = run_with_ra(model, ids, target=TARGETS, position=[2, 4])
    for layer, gradient in enumerate(gradients):
        assert relative(ra["ra", layer] / ra.scale[layer], gradient) < 1e-5
        assert torch.equal(placed["ra", layer], ra["ra", layer])
    with pytest.raises(BadInput, match=r"prompt 0 has 0 mask tokens.*position="):
        run_with_ra(model, IDS, target=3)
    with pytest.raises(BadInput, match=r"answer of 2 tokens.*both directions.*one token"):
        run_with_ra(model, ids, target="w3 w4")


# ---- layers that run several times ---------------------------------------------------------------


def test_layers_run_in_a_loop_give_the_maps_of_their_last_time(both):
    model, reference = both("hrm_text")
    n_sites = 4
    for _ in range(2):
        _, ra = run_with_ra(model, IDS, target=TARGETS)
        labels = [site.label for site in ra.sites.values()]
        assert labels == ["L 0", "L 1", "H 0", "H 1"]
        assert all(site.repeated for site in ra.sites.values())
        # The last round runs the low blocks and then the high ones.
        gradients, patterns = reference.score_gradients(IDS, last_nll)
        for layer in range(n_sites):
            assert relative(ra["ra", layer] / ra.scale[layer], gradients[layer]) < 1e-5
            assert relative(ra["pattern", layer], patterns[layer]) < 1e-5
    # It is the whole derivative with respect to these scores: finite differences say so too.
    last = len(reference.sites_called(IDS)) - n_sites
    direction = torch.randn(2, 4, POS, POS, generator=torch.Generator().manual_seed(3)).tril()
    for layer in range(n_sites):
        with torch.no_grad():
            up, down = (
                float(last_nll(reference.logits(IDS, {last + layer: sign * direction})))
                for sign in (1e-2, -1e-2)
            )
        predicted = float((ra["ra", layer] / ra.scale[layer] * direction).sum())
        assert (up - down) / 2e-2 == pytest.approx(predicted, rel=2e-2, abs=2e-3)


def test_a_patch_is_added_each_time_a_layer_runs(both):
    model, reference = both("hrm_text")
    _, ra = run_with_ra(model, IDS, target=TARGETS)
    value = 0.5 * ra["ra", 2] / ra["ra", 2].abs().max()
    assert ra.sites[2].label == "H 0"
    assert reference.sites_called(IDS).count(2) > 1
    plain, wanted = reference.logits(IDS), reference.logits(IDS, pattern_deltas={2: value})
    with torch.no_grad():
        found = model.run_with_hooks(IDS, fwd_hooks=patch_hooks({2: value}, ra.sites, scale=1.0))
    assert relative(found - plain, wanted - plain) < 1e-3


# ---- masked heads --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "layer", "output"),
    [
        ("deepseek_v3", 1, "model.layers.1.self_attn.o_proj"),
        ("afmoe", 0, "model.layers.0.self_attn.o_proj"),
        ("bart", 5, "model.decoder.layers.1.encoder_attn.out_proj"),
        ("bert", 0, "bert.encoder.layer.0.attention.output.dense"),
    ],
)
def test_masking_a_head_is_zeroing_its_part_of_w_o(arch, layer, output, both, written):
    model, _ = both(arch)
    sites = as_lens(model).sites
    keep = torch.ones(len(sites), 4, dtype=torch.bool)
    keep[layer, 2] = False
    with torch.no_grad():
        found = model.run_with_hooks(IDS, fwd_hooks=mask_hooks(sites, keep), **inputs_of(arch))
    without = open_model(arch, written(arch))
    plain = without.logits(IDS, **hf_inputs_of(arch))
    weight = without.model.get_submodule(output).weight.data
    weight.reshape(len(weight), 4, -1)[:, 2] = 0
    wanted = without.logits(IDS, **hf_inputs_of(arch))
    assert relative(found, wanted) < 1e-5
    assert relative(plain, wanted) > 1e-3


# ---- refused -------------------------------------------------------------------------------------


def test_patches_that_cannot_be_added_are_refused(both):
    model, _ = both("jetmoe")
    _, ra = run_with_ra(model, IDS, target=TARGETS)
    with pytest.raises(UnsupportedModel, match=r"pattern of layer 0.*no hook point shows the val"):
        ra.mean().patch_hooks(scale=1.0)


def test_models_without_attention_and_models_that_do_not_boot_say_so(written):
    model = load_folder(written("mamba"), kind=BRIDGE, device="cpu")
    with pytest.raises(UnsupportedModel, match=r"no hook point.*no softmax attention, as Mamba"):
        run_with_ra(model, IDS, target=3)
    with pytest.raises(BadInput, match=r"TransformerBridge cannot load.*multi_query.*another vers"):
        load_folder(written("gpt_bigcode"), kind=BRIDGE, device="cpu")


# ---- scales that are not known -------------------------------------------------------------------


def test_an_unknown_scale_can_be_given(both, written):
    _, reference = both("openai_gpt")
    model = load_folder(written("openai_gpt"), kind=BRIDGE, device="cpu")
    for layer in range(2):
        del model.blocks[layer].attn.original_component.scale
    for call in (lambda: run_with_ra(model, IDS, target=3), lambda: get_ra_caching_hooks(model)):
        with pytest.raises(UnsupportedModel, match=r"scale of layer 0 is unknown.*softmax_scale="):
            call()
    gradients, _ = reference.score_gradients(IDS, last_nll)
    _, ra = run_with_ra(model, IDS, target=TARGETS, softmax_scale=1.0)
    assert relative(ra["ra", 1], gradients[1]) < 1e-5
    _, ra = run_with_ra(model, IDS, target=TARGETS, softmax_scale={0: 2.0, 1: 3.0})
    assert ra.scale == {0: 2.0, 1: 3.0}
    assert relative(ra["ra", 1], 3 * gradients[1]) < 1e-5
    with pytest.raises(BadInput, match=r"softmax_scale for layers \[7\].*are \[0, 1\]"):
        run_with_ra(model, IDS, target=3, softmax_scale={7: 1.0})


def test_vocabulary_is_what_the_tests_think(both):
    assert as_lens(both("bert")[0]).d_vocab == D_VOCAB
