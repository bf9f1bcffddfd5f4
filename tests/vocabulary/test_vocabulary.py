"""Vectors of heads in the residual stream and in tokens: against Hugging Face, and a toy."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
import torch
import transformers

import tiny_models
from arch_models import has, load_bridge
from folded import fold
from projected import layer_of, load_projected
from ra_lens import run_with_ra
from ra_lens.errors import NotStored, UnsupportedModel
from ra_lens.vocabulary import KINDS, Vocabulary, read_vectors
from refused import refused, unchecked
from saved_models import save, silence
from tiny_models import (
    ANY_KIND,
    CASES,
    D_VOCAB,
    N_HEADS,
    every_model,
    load,
    random_ids,
    relative,
    text,
    tokenizer,
)

CLASSES = tiny_models.KINDS
LAYER, TARGET, POS = 1, 8, 7
IDS = random_ids(POS)


def vectors_of(model, ids=IDS, **options):
    return run_with_ra(model, ids[None], target=TARGET, vectors=True, **options)[1]


# ---- against Hugging Face's model, in float64 ----------------------------------------------------


def wanted_directions(layer, head, group):
    """Every kind from Hugging Face's weights, activations and gradients."""
    w, seen = layer.weights, layer.seen
    w_q, w_o, w_k, w_v = w["W_Q"][head], w["W_O"][head], w["W_K"][group], w["W_V"][group]
    q, k, v, z = seen["q"][:, head], seen["k"][:, group], seen["v"][:, group], seen["z"][:, head]
    dq, dk, dv = seen["q.grad"][:, head], seen["k.grad"][:, group], seen["v.grad"][:, group]
    return {
        "query": layer.back(q @ w_k.T),
        "key": layer.back(k @ w_q.T),
        "value": v @ w_o,
        "z": z @ w_o,
        "query_step": layer.back(-dq @ w_k.T),
        "key_step": layer.back(-dk @ w_q.T),
        "value_step": -dv @ w_o,
        "z_step": -seen["z.grad"][:, head] @ w_o,
        "query_in_step": layer.back(-dq @ w_q.T),
        "key_in_step": layer.back(-dk @ w_k.T),
        "value_in_step": layer.back(-dv @ w_v.T),
        "out_step": -seen["out.grad"],
    }


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_every_kind_is_what_hugging_face_and_autograd_give(arch, kind, shared, folder):
    layer = layer_of(arch, load_projected(arch, folder(arch)), LAYER, IDS, TARGET)
    model = shared(arch, kind)
    ra, vocabulary = vectors_of(model), Vocabulary(model)
    for head in range(N_HEADS):
        wanted = wanted_directions(layer, head, ra.kv_group((LAYER, head)))
        assert set(wanted) == set(KINDS)
        for name, directions in wanted.items():
            found = vocabulary.vectors(ra, (LAYER, head), name)
            assert relative(found, directions) < 2e-4, (name, head)


@pytest.mark.parametrize(("arch", "kind"), [case for case in CASES if case[0] != "gptj"])
def test_what_heads_ask_of_the_stream_adds_up_to_its_gradient(arch, kind, shared, folder):
    # GPT-J's norm feeds its MLP too.
    layer = layer_of(arch, load_projected(arch, folder(arch)), LAYER, IDS, TARGET)
    model = shared(arch, kind)
    ra, vocabulary = vectors_of(model), Vocabulary(model)
    heads = [(LAYER, head) for head in range(N_HEADS)]
    one_each = [heads[g] for g in {ra.kv_group(h): i for i, h in enumerate(heads)}.values()]
    total = sum(vocabulary.vectors(ra, head, "query_in_step") for head in heads)
    for kind_of_shared in ("key_in_step", "value_in_step"):
        total = total + sum(vocabulary.vectors(ra, head, kind_of_shared) for head in one_each)
    assert relative(total, -layer.back(layer.seen["x.grad"])) < 2e-4


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_query_scores_tokens_as_their_keys_do(arch, kind, shared, folder):
    # q·k, before rotation, of stream r: r/size(r) · `query`, up to what is the same for all keys.
    layer = layer_of(arch, load_projected(arch, folder(arch)), LAYER, IDS, TARGET)
    model = shared(arch, kind)
    ra, vocabulary = vectors_of(model), Vocabulary(model)
    r = layer.seen["r"]
    about = r - r.mean(-1, keepdim=True) if layer.centred else r
    r = r / about.square().mean(-1, keepdim=True).sqrt()
    for head in range(N_HEADS):
        group = ra.kv_group((LAYER, head))
        q, k = layer.seen["q"][:, head], layer.seen["k"][:, group]
        products = q @ k.T
        for name, wanted in (("query", products), ("key", products.T)):
            found = vocabulary.vectors(ra, (LAYER, head), name).double() @ r.T
            assert relative(found - found[:, :1], wanted - wanted[:, :1]) < 1e-3


# ---- a toy that is worked out by hand ------------------------------------------------------------
# Words lie in the first D_VOCAB dimensions and are read off there too. Head 0 looks everywhere
# alike and writes the word 3 places on; its queries look for w5, whatever the token, with keys that
# are 0 but for what the weights would make of them. Head 1 looks for the word one place on.

FIRST, SOUGHT, ON = 3, 5, 3
ASKED = 9  # the target; the word 3 places before it writes it
PROMPT = [12, ASKED - ON, 20, 15, 28]


def on(word, places):
    return FIRST + (word - FIRST + places) % (D_VOCAB - FIRST)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    n, d_head = D_VOCAB, D_VOCAB
    config = transformers.GPT2Config(
        vocab_size=n,
        n_layer=1,
        n_head=2,
        n_embd=2 * n,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.GPT2LMHeadModel(config)
    silence(model)
    with torch.no_grad():
        attn = model.transformer.h[0].attn
        queries, keys, values = (2 * n * i for i in range(3))
        attn.c_attn.bias[queries + SOUGHT] = 1.0  # head 0
        for word in range(FIRST, n):
            model.transformer.wte.weight[word, word] = 1.0
            model.lm_head.weight[word, word] = 1.0
            attn.c_attn.weight[word, keys + word] = 0.1
            attn.c_attn.weight[word, queries + d_head + on(word, 1)] = 0.1
            attn.c_attn.weight[word, keys + d_head + word] = 0.1
            for head in (0, 1):
                attn.c_attn.weight[word, values + head * d_head + word] = 1.0
                attn.c_proj.weight[head * d_head + word, on(word, ON)] = 0.2
    return save(model, tokenizer("gpt2"), tmp_path_factory.mktemp("toy"))


@pytest.fixture(params=CLASSES)
def toy(request, toy_folder):
    model = load(toy_folder, request.param)
    _, ra = run_with_ra(model, torch.tensor([PROMPT]), target=ASKED, vectors=True)
    return model, ra


@pytest.mark.parametrize(
    ("head", "kind", "position", "word"),
    [
        (0, "query", 0, SOUGHT),
        (0, "query", 4, SOUGHT),
        (1, "query", 2, on(PROMPT[2], 1)),
        (1, "key", 2, on(PROMPT[2], -1)),  # the word whose query looks for it
        (0, "value", 2, on(PROMPT[2], ON)),
        (1, "value", 3, on(PROMPT[3], ON)),
        (0, "z", 0, on(PROMPT[0], ON)),  # the first token sees only itself
        (0, "out_step", 4, ASKED),
        (0, "z_step", 4, ASKED),
        (0, "value_step", 4, ASKED),
        (1, "value_step", 1, ASKED),
        (0, "value_in_step", 2, on(ASKED, -ON)),  # be the word that writes the answer
        (1, "query_step", 4, PROMPT[1]),  # look for the one that does
        (1, "query_in_step", 4, on(PROMPT[1], -1)),  # be a word that looks for it
        (1, "key_step", 1, PROMPT[4]),  # be found by the last
        (1, "key_in_step", 1, on(PROMPT[4], 1)),  # be the word that it looks for
    ],
)
def test_what_a_toy_reads_looks_for_writes_and_wants_is_known(toy, head, kind, position, word):
    model, ra = toy
    read = read_vectors(ra, model, (0, head), kinds=kind, target=word, k=1)
    entry = read.at(position, kind)
    assert (entry.top[0].id, entry.top[0].token) == (word, f"w{word}")
    assert entry.rank == 1
    assert entry.score == pytest.approx(entry.top[0].score)


def test_descent_pulls_away_from_what_does_not_write_the_answer(toy):
    model, ra = toy
    read = read_vectors(ra, model, "L0H1", kinds=["query_step", "z_step"], positions=-1, k=33)
    step = read.at(-1, "query_step")
    lowest = {token.id for token in step.bottom[:4]}
    assert lowest == {word for word in PROMPT if word != PROMPT[1]}
    # A step of descent makes room for the answer at the cost of what the model says now: what the
    # heads write, and the last word itself.
    said = {*(on(word, ON) for word in PROMPT), PROMPT[-1]} - {ASKED}
    assert {token.id for token in read.at(-1, "z_step").bottom[: len(said)]} == said


# ---- what holds of every reading -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ANY_KIND)
def test_ends_ranks_and_scores_agree(kind, shared):
    model = shared("gpt2", kind)
    ra, vocabulary = vectors_of(model), Vocabulary(model)
    read = vocabulary.read(ra, "L1H2", target=TARGET, k=4)
    assert [row.position for row in read] == sorted(row.position for row in read)
    assert len(read) == POS * len(KINDS)
    for row in read:
        direction = vocabulary.vectors(ra, "L1H2", row.kind)[row.position]
        assert row.norm == pytest.approx(float(direction.norm()))
        scores = vocabulary.scores(direction)
        if not direction.any():
            assert (row.top, row.bottom, row.rank, row.score) == ((), (), None, None)
            continue
        assert abs(float(scores.mean())) < 1e-4 * float(scores.abs().max())
        order = scores.argsort(descending=True).tolist()
        assert [token.id for token in row.top] == order[:4]
        assert [token.id for token in row.bottom] == order[::-1][:4]
        assert row.rank == order.index(TARGET) + 1
        assert vocabulary.ranks(direction, [TARGET, order[-1]]).tolist() == [row.rank, D_VOCAB]
    first = read.at(0, "query_step")  # the first token sees only itself: nothing to look for
    assert first.rank is None or first.norm < 1e-6


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_vector_of_zeros_ranks_nothing_and_ties_count_before(kind, shared):
    vocabulary = Vocabulary(shared("gpt2", kind))
    zeros = torch.zeros(2, 3, 24)
    assert vocabulary.ranks(zeros, [4, 5]).tolist() == [[[-1, -1]] * 3] * 2
    assert vocabulary.ranks(torch.full((24,), 2.0), [4]).tolist() == [D_VOCAB]  # centred: all alike


@pytest.mark.parametrize("kind", CLASSES)
def test_folding_changes_no_reading(kind, fresh):
    plain, folded = fresh("gpt2", kind), fresh("gpt2", kind)
    options = {"fold_ln": True, "center_unembed": True, "center_writing_weights": True}
    fold(folded, kind, **options, fold_value_biases=False)
    found = []
    for model in (plain, folded):
        ra, vocabulary = vectors_of(model), Vocabulary(model)
        found.append(
            [vocabulary.scores(vocabulary.vectors(ra, (LAYER, 3), name)) for name in KINDS]
        )
    for name, one, other in zip(KINDS, *found, strict=True):
        # The bias of the norm in front becomes one of the value, of which there is none otherwise.
        assert relative(other, one) < 1e-3, name


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("side", ["left", *every_model("right")])
def test_padding_is_left_out(kind, side, shared):
    model = shared("llama", kind)
    prompts = [text(IDS), text(IDS[:4])]
    options = {"target": f"w{TARGET}", "vectors": True, "padding_side": side}
    _, both = run_with_ra(model, prompts, **options)
    _, alone = run_with_ra(model, prompts[1], **options)
    wanted = read_vectors(alone, model, "L1H1", target=TARGET)
    found = read_vectors(both, model, "L1H1", example=1, target=TARGET)
    assert [row.token for row in found] == [row.token for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert (one.position, one.kind) == (other.position, other.kind)
        assert one.norm == pytest.approx(other.norm, rel=1e-3, abs=1e-6)
        if other.norm > 1e-5:
            assert [t.score for t in one.top] == pytest.approx(
                [t.score for t in other.top], rel=1e-2, abs=1e-5
            )


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_reading_is_a_table_and_a_text(kind, shared):
    model = shared("gpt2", kind)
    _, ra = run_with_ra(model, text(IDS), target=f"w{TARGET}", vectors=True)
    kinds = ("z_step", "value")
    read = read_vectors(ra, model, "L2H0", kinds=kinds, positions=[-1, 1], target="w8", k=2)
    frame = read.to_dataframe()
    assert isinstance(frame, pd.DataFrame)
    last = len(ra.str_tokens[0]) - 1
    assert list(zip(frame.position, frame.kind, strict=True)) == [
        (1, "value"),
        (1, "z_step"),
        (last, "value"),
        (last, "z_step"),
    ]
    row = read.at(-1, "z_step")
    assert frame.iloc[-1]["top"] == " ".join(token.token for token in row.top)
    assert frame.iloc[-1]["rank"] == row.rank
    assert len(frame.iloc[-1]["bottom_scores"]) == 2
    assert (read.label, read.target, len(read[:2])) == ("L2H0", "w8", 2)
    lines = repr(read).splitlines()
    assert lines[0] == "L2H0, target w8:"
    assert row.top[0].token in lines[-1]
    assert f"target: {row.rank}" in lines[-1]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ANY_KIND)
def test_what_cannot_be_read_is_said(kind, shared):
    model = shared("gpt2", kind)
    ra = vectors_of(model)
    read = partial(unchecked(Vocabulary.read), Vocabulary(model))
    good = {"ra": ra, "head": "L1H1", "positions": -1}
    for change, message in (
        ({"kinds": "keys"}, "found kinds='keys'; give one of 'query', 'key'"),
        ({"positions": 7}, "7 is none of the 7 tokens"),
        ({"example": 1}, "found example=1; this cache has examples 0 to 0"),
        ({"target": D_VOCAB}, f"found token {D_VOCAB}; .* has tokens 0 to {D_VOCAB - 1}"),
        ({"target": ""}, "found target=''; give text, such as ' Paris', or a token id"),
        ({"k": 0}, "k=0"),
        ({"head": "L1H9"}, "has layers .* with heads 0 to 3"),
    ):
        refused(read, {**good, **change}, message)
    refused(
        read(ra, "L1H1", kinds="z", positions=2).at,
        {"position": 1, "kind": "z"},
        r"found position 1, kind 'z'; read were positions \[2\] and kinds z",
    )
    other = vectors_of(shared("llama", kind))
    refused(read, {**good, "ra": other}, "which has no such layer. Give the cache of a run")
    _, plain = run_with_ra(model, IDS[None], target=TARGET)
    refused(read, {**good, "ra": plain}, "vectors=True", error=NotStored)


@pytest.mark.every_model
def test_a_norm_of_queries_is_refused_where_it_matters(tmp_path):
    if not has("qwen3"):
        pytest.skip("no qwen3 here")
    model = load_bridge("qwen3", tmp_path)
    ra, vocabulary = vectors_of(model), Vocabulary(model)
    for kind in ("query", "key"):
        with pytest.raises(UnsupportedModel, match=f"does more to its {kind} than to turn it"):
            vocabulary.vectors(ra, "L0H0", kind)
        assert vocabulary.vectors(ra, "L0H0", f"{kind}_step").any()


@pytest.mark.every_model
def test_layers_that_a_norm_follows_give_what_needs_no_w_o(tmp_path):
    if not has("gemma2"):
        pytest.skip("no gemma2 here")
    model = load_bridge("gemma2", tmp_path)
    ra, vocabulary = vectors_of(model), Vocabulary(model)
    with pytest.raises(UnsupportedModel, match="stands between it and the residual stream"):
        vocabulary.vectors(ra, "L0H0", "z_step")
    assert vocabulary.vectors(ra, "L0H0", "value_in_step").any()
