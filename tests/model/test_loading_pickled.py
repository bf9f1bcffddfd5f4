"""Pickled weights are read only where that is allowed, and code of a model never is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import call, refused_line
from ra_lens import load_model
from ra_lens.errors import BadInput
from ra_lens.model import load_folder
from tiny_models import KINDS, random_ids

IDS = random_ids(1, 5)
NEEDED = r"pickled \(pytorch_model\.bin\).*can run any code.*allow_pickle=True, or --allow-pickle"


@pytest.fixture
def pickled(folder, tmp_path) -> Path:
    """A folder whose weights are pickled, without safetensors."""
    there = shutil.copytree(folder("gpt2"), tmp_path / "pickled")
    model = load_state(there)
    (there / "model.safetensors").unlink()
    torch.save(model, there / "pytorch_model.bin")
    return there


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_pickled_weights_is_refused_unless_allowed(kind, pickled, folder):
    with pytest.raises(BadInput, match=NEEDED):
        load_model(pickled, kind=kind, device="cpu")
    allowed = load_model(pickled, kind=kind, device="cpu", allow_pickle=True)
    assert torch.equal(allowed(IDS), load_folder(folder("gpt2"), kind=kind, device="cpu")(IDS))


@pytest.mark.parametrize("name", ["model.pt", "weights.pth", "last.ckpt", "pytorch_model-1.bin"])
def test_other_names_of_pickled_weights_are_known(name, pickled):
    (pickled / "pytorch_model.bin").rename(pickled / name)
    with pytest.raises(BadInput, match=rf"pickled \({name}\)"):
        load_model(pickled)


def test_safetensors_beside_pickled_weights_are_read(folder, tmp_path):
    there = shutil.copytree(folder("gpt2"), tmp_path / "both")
    (there / "pytorch_model.bin").write_bytes(b"this would not load")
    (there / "training_args.bin").write_bytes(b"nor this")
    for kind in KINDS:
        assert load_model(there, kind=kind, device="cpu")(IDS).shape[1] == 5


def test_an_index_of_safetensors_that_names_pickles_is_refused(pickled):
    index = {"weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
    (pickled / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=NEEDED):
        load_model(pickled)


def test_a_file_of_weights_is_no_model(pickled, folder):
    with pytest.raises(
        BadInput, match=r"pytorch_model\.bin holds weights that are pickled.*folder"
    ):
        load_model(pickled / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"model\.safetensors holds weights only. Give its folder"):
        load_model(folder("gpt2") / "model.safetensors")


def test_the_command_line_has_an_option_for_it(pickled):
    said = refused_line("check", "--model", str(pickled))
    assert "pickled (pytorch_model.bin)" in said
    assert call("check", "--model", str(pickled), "--allow-pickle").exit_code == 0
    rank = ["rank", "--task", "antonym", "--model", str(pickled), "--shots", "0"]
    assert "--allow-pickle" in refused_line(*rank)


@pytest.mark.skipif("HookedTransformer" not in KINDS, reason="a name of HookedTransformer's only")
def test_models_of_transformer_lens_that_are_pickled_are_refused_by_name():
    with pytest.raises(
        BadInput, match=r"weights of 'gelu-1l' \(NeelNanda/GELU.*are pickled.*any co"
    ):
        load_model("gelu-1l")
    with warnings.catch_warnings(), pytest.raises(BadInput) as tried:
        warnings.simplefilter("ignore", DeprecationWarning)  # TransformerLens 3, of its class
        load_model("gelu-1l", kind="HookedTransformer", allow_pickle=True)
    assert "pickled" not in str(tried.value)  # offline: it got further


DOWNLOADED = """\
import sys
from ra_lens import load_model
from ra_lens.errors import BadInput
name, kind = sys.argv[1:]
for allow in (False, True):
    try:
        model = load_model(name, kind=kind, device="cpu", allow_pickle=allow)
    except BadInput as error:
        print("refused", error)
    else:
        print("loaded", type(model).__name__)
"""


@pytest.mark.every_model  # a process of its own
@pytest.mark.parametrize("kind", KINDS)
def test_a_download_by_name_reads_no_pickled_weights(kind, pickled, tmp_path):
    """Transformers' own cache holds a model as it is after a download, with and without."""
    name = "sshleifer/tiny-gpt2" if KINDS == ("TransformerBridge",) else "distilgpt2"
    hub = tmp_path / "home" / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = hub / "snapshots" / ("0" * 40)
    shutil.copytree(pickled, snapshot)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)

    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", DOWNLOADED, name, kind]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    lines = done.stdout.splitlines()
    (refused,) = (line for line in lines if line.startswith("refused"))
    assert "pickled weights are only read where that is allowed" in refused
    assert lines[-1] == f"loaded {kind}"


def test_code_that_a_model_brings_along_is_never_run(folder, monkeypatch):
    import transformers

    asked: list[Any] = []
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        cls = getattr(transformers, name)
        theirs = cls.__dict__["from_pretrained"].__func__

        def noted(cls: Any, *given: Any, _theirs: Any = theirs, **options: Any) -> Any:
            asked.append(options.get("trust_remote_code"))
            return _theirs(cls, *given, **options)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(noted))
    for kind in KINDS:
        load_model(folder("gpt2"), kind=kind, device="cpu")
    assert len(asked) >= 3 * len(KINDS)
    assert not any(asked)


def test_a_folder_with_code_of_its_own_is_refused(folder, tmp_path):
    there = shutil.copytree(folder("gpt2"), tmp_path / "own")
    config = json.loads((there / "config.json").read_text())
    config["model_type"] = "their_own"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (there / "config.json").write_text(json.dumps(config))
    (there / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BadInput, match=r"contains custom code"):
        load_model(there, device="cpu")
