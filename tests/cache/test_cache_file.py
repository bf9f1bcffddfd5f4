"""Files: nothing lost, nothing half written, nothing foreign believed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ra_lens import RACache, run_with_ra
from ra_lens.errors import BadFile, BadInput, NotStored
from tiny_models import ANY_KIND, KINDS, random_ids, relative, text


def caches(model):
    """One of every shape: plain, padded, sliced, norms only, half precision, a custom metric."""
    ids = random_ids(2, 6)
    prompts = [text(random_ids(n)) for n in (3, 6)]
    yield run_with_ra(model, ids, target=[8, 9])[1]
    yield run_with_ra(model, prompts, target=["w4 w5", "w6"], padding_side="left")[1]
    yield run_with_ra(model, ids, target=8)[1].apply_slice_to_batch_dim(1)
    yield run_with_ra(model, prompts, store="norms")[1]
    yield run_with_ra(model, ids, target=8, dtype=torch.bfloat16, layers=[0, 2])[1]
    yield run_with_ra(model, ids, metric=lambda logits: logits[:, -1, 5].sum())[1]


@pytest.mark.parametrize("kind", ANY_KIND)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(kind, shared, tmp_path):
    for n, ra in enumerate(caches(shared("llama", kind))):
        path = tmp_path / f"cache {n}.safetensors"
        ra.save(path)
        back = RACache.load(str(path))
        assert list(back) == list(ra)
        for name, value in ra.items():
            assert back[name].dtype == value.dtype
            assert torch.equal(back[name], value)
        for what in ("ra", "pattern", "pattern_grad"):
            assert torch.equal(back.norms(what), ra.norms(what))
        assert torch.equal(back.loss, ra.loss)
        assert (back.info, back.sites, back.store) == (ra.info, ra.sites, ra.store)
        assert (back.has_batch_dim, back.str_tokens) == (ra.has_batch_dim, ra.str_tokens)
        assert repr(back) == repr(ra)
        if ra.store == "maps" and n != 1:
            assert relative(back.mean()["ra", 0], ra.mean()["ra", 0]) == 0


@pytest.fixture
def ra(shared):
    return run_with_ra(shared("gpt2", KINDS[0]), random_ids(2, 6), target=8)[1]


def test_a_file_holds_no_pickle_and_other_tools_can_read_it(ra, tmp_path):
    ra.save(tmp_path / "cache")
    tensors = load_file(tmp_path / "cache")
    assert any(torch.equal(value, ra["ra", 1]) for value in tensors.values())
    assert b"pickle" not in (tmp_path / "cache").read_bytes()


def test_a_file_gets_the_permissions_that_any_new_file_gets(ra, tmp_path):
    (tmp_path / "plain").write_text("")
    ra.save(tmp_path / "cache")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "cache")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError("disk full"), BadInput), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_other(
    ra, tmp_path, monkeypatch, error, raised
):
    path = tmp_path / "cache"
    ra.save(path)
    old = path.read_bytes()

    def half(tensors, filename, **options):
        save_file(tensors, filename, **options)
        with open(filename, "r+b") as file:
            file.truncate(200)
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(raised):
        replace(ra, loss=ra.loss + 1).save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_destination_that_cannot_be_written_leaves_nothing(ra, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match="cannot write"):
        ra.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(BadInput, match="cannot write"):
        ra.save(tmp_path / "missing" / "cache")


def test_a_missing_file(tmp_path):
    with pytest.raises(BadFile, match=r"no file .*nothing.*RACache.save"):
        RACache.load(tmp_path / "nothing")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file(ra, tmp_path, share):
    ra.save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadFile, match=r"cut is damaged or not a safetensors file.*make it again"):
        RACache.load(tmp_path / "cut")


def test_files_of_others(ra, tmp_path):
    (tmp_path / "text").write_text("a,b\n1,2\n" * 50)
    with pytest.raises(BadFile, match="not a safetensors file"):
        RACache.load(tmp_path / "text")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.pt")
    with pytest.raises(BadFile, match="not a safetensors file"):
        RACache.load(tmp_path / "pickle.pt")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(BadFile, match=r"a safetensors file, but not one written by RACache.save"):
        RACache.load(tmp_path / "weights")


def rewritten(ra, path, change):
    """Save a cache with its description changed."""
    ra.save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["ra_lens"])
    changed = change(description)
    save_file(load_file(path), path, metadata={"ra_lens": changed})


def test_a_cache_of_another_format(ra, tmp_path):
    rewritten(ra, tmp_path / "cache", lambda d: json.dumps({**d, "format": 99}))
    with pytest.raises(BadFile, match=r"cache format 99; this ra_lens reads \d.*again"):
        RACache.load(tmp_path / "cache")


@pytest.mark.parametrize(("bos", "front"), [(True, "<|endoftext|>"), (False, ""), (None, None)])
def test_a_cache_of_the_first_format_told_whether_bos_was_in_front(tmp_path, shared, bos, front):
    given = torch.tensor([[0, 4, 5]]) if bos is None else "w4 w5"
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), given, target=9, prepend_bos=bos)

    def of_the_first(description):
        info = {name: v for name, v in description["info"].items() if name != "prepended"}
        info["bos_prepended"] = bos
        return json.dumps({**description, "format": 1, "info": info})

    rewritten(ra, tmp_path / "cache", of_the_first)
    assert RACache.load(tmp_path / "cache").info == ra.info
    assert ra.info.prepended == front


@pytest.mark.parametrize(
    "change",
    [
        lambda d: "not json",
        lambda d: "[]",
        lambda d: json.dumps({"format": d["format"]}),
        lambda d: json.dumps({**d, "sites": [{"layer": 0}]}),
        lambda d: json.dumps({**d, "info": {"unknown": 1}}),
    ],
)
def test_a_damaged_description(ra, tmp_path, change):
    rewritten(ra, tmp_path / "cache", change)
    with pytest.raises(BadFile):
        RACache.load(tmp_path / "cache")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_mean_is_saved_and_patches_as_before(kind, dtype, shared, tmp_path):
    model, ids = shared("gpt2", kind), random_ids(5, 6)
    options = {"target": 8, "store": "mean", "batch_size": 2, "progress": False}
    _, ra = run_with_ra(model, ids, **options, dtype=dtype, names_filter=lambda n: "grad" not in n)
    ra.save(tmp_path / "cache")
    back = RACache.load(tmp_path / "cache")
    assert (repr(back), repr(back.mean())) == (repr(ra), repr(ra.mean()))
    assert back.mean().count == 5
    for name in ("ra", "pattern"):
        for layer in ra.layers:
            assert back.mean()[name, layer].dtype == (dtype or torch.float32)
            assert torch.equal(back.mean()[name, layer], ra.mean()[name, layer])
    with pytest.raises(NotStored, match="not among the mean maps"):
        back.mean()["pattern_grad", 0]
    patched = [
        model.run_with_hooks(ids, fwd_hooks=cache.mean().patch_hooks(scale=-20.0))
        for cache in (ra, back)
    ]
    assert torch.equal(*patched)
    assert not torch.equal(patched[0], model(ids))
    with pytest.raises(NotStored, match=r"store='mean', which gives ra.mean\(\)"):
        back["ra", 0]
