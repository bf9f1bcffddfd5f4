"""Arguments of unusual types and forms, each with what should come of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from ra_lens import get_ra_caching_hooks, run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.sites import load_folder
from tiny_models import KINDS, random_ids, relative

IDS = random_ids(2, 5)
TARGET = 4


@pytest.fixture(params=KINDS)
def model(request, shared):
    return shared("gpt2", request.param)


def test_integers_of_numpy_are_ids_and_positions(model):
    _, plain = run_with_ra(model, IDS, target=[4, 5], position=2)
    _, ra = run_with_ra(model, IDS, target=[np.int64(4), np.int64(5)], position=np.int64(2))
    assert relative(ra.stack(), plain.stack()) == 0
    _, ra = run_with_ra(model, IDS, target=torch.tensor([4, 5]), position=torch.tensor([2, 2]))
    assert relative(ra.stack(), plain.stack()) == 0


# What a type checker refuses, the tests' own included: asked for where nothing is checked.
UNTYPED = """
import sys
from ra_lens import run_with_ra
from ra_lens.sites import load_folder

model = load_folder(sys.argv[1], kind=sys.argv[2])
for target in ([[4.7]], [["w4"]], [[]], [True], [None]):
    try:
        run_with_ra(model, "w4 w5", target=target)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_targets_that_are_no_tokens(folder):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNTYPED, str(folder("gpt2")), KINDS[0]],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in run.stdout.splitlines() if "target 0" in line]
    wanted = (
        r"BadInput: target 0 is \[4.7\].*token ids of one answer",
        r"BadInput: target 0 is \['w4'\].*Give text as text",
        r"BadInput: target 0 is \[\].*at least one",
        r"BadInput: target 0 is a bool; give text or a token id",
        r"BadInput: target 0 is a NoneType; give text or a token id",
    )
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.match(pattern, line), line


def test_a_position_that_is_no_integer(model):
    with pytest.raises(BadInput, match=r"position=tensor\(\[1\.5.*Give one integer"):
        run_with_ra(model, IDS, target=TARGET, position=torch.tensor([1.5, 2.0]))


def test_negative_layers_count_from_the_end_of_the_model(model):
    _, whole = run_with_ra(model, IDS, target=TARGET)
    _, ra = run_with_ra(model, IDS, target=TARGET, layers=[0, 1])
    assert relative(ra["ra", -2], whole["ra", 1]) < 1e-5
    assert ("ra", -1) not in ra


def test_a_name_of_a_layer_that_is_not_collected(model):
    name = "blocks.0.attn.hook_ra"
    with pytest.raises(BadInput, match=r"blocks.0.attn.hook_ra.*no map of the layers collected"):
        run_with_ra(model, IDS, target=TARGET, layers=[1], names_filter=name)


def test_no_heads_are_no_answer(model):
    _, ra = run_with_ra(model, IDS, target=TARGET)
    with pytest.raises(BadInput, match=r"k=-1; ask for at least one head"):
        ra.top_heads(-1)


def test_hooks_say_when_gradients_are_off(model):
    _, fwd_hooks, _ = get_ra_caching_hooks(model)
    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=fwd_hooks),
        pytest.raises(UnsupportedModel, match=r"gradients switched off.*torch.enable_grad"),
    ):
        model(IDS)


def test_a_mean_in_low_precision_is_summed_in_full(model):
    ids = random_ids(40, 5)
    _, exact = run_with_ra(model, ids, target=TARGET, store="mean", batch_size=4, progress=False)
    _, rough = run_with_ra(
        model, ids, target=TARGET, store="mean", batch_size=4, progress=False, dtype=torch.bfloat16
    )
    low, full = rough.mean()["ra", 1], exact.mean()["ra", 1]
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, full.to(torch.bfloat16))


def test_a_running_mean_moves_with_its_cache(model):
    _, ra = run_with_ra(model, IDS, target=TARGET, store="mean")
    assert ra.to(torch.float64).mean()["ra", 0].dtype == torch.float64


@pytest.mark.skipif("HookedTransformer" not in KINDS, reason="no HookedTransformer here")
def test_an_architecture_that_cannot_be_converted(folder):
    source = folder("gpt2")
    broken = source.parent / "broken"
    shutil.copytree(source, broken, dirs_exist_ok=True)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(BadInput, match=r"HookedTransformer cannot convert.*TransformerBridge"):
        load_folder(broken, kind="HookedTransformer")


def test_a_folder_without_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder("gpt2") / "config.json").read_text())
    with pytest.raises(BadInput, match=r"cannot be loaded|cannot convert"):
        load_folder(tmp_path, kind=KINDS[0])
