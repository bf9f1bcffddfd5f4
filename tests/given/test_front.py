"""What stands in front of a prompt: BOS, nothing, or a token given as text.

Ids are written down by hand: the word `w5` has the id 5 (`tiny_models`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import processors

from ra_lens import perturbation_test, rank_heads, run_with_ra, trace_paths
from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.experiments import patching_sweep, rank_tasks, read_results, write_results
from ra_lens.heads import RankingContext
from ra_lens.model import as_lens, load_folder
from ra_lens.paths.read import read_maps
from ra_lens.prompts import read_prompts
from ra_lens.questions import read_questions
from ra_lens.report import write_report
from ra_lens.report.predictions import patched_predictions
from ra_lens.targets import sequence_nll
from ra_lens.tasks import Pair, Prompt, Task
from refused import refused, unchecked
from tiny_models import ANY_KIND, write_folder

END, START, PAD = 0, 1, 2
# What stands in front of `w5 w9`, by what is asked for, where BOS is `<s>`.
FRONTS: list[tuple[Any, list[int], str]] = [
    (None, [START], "<s>"),
    (True, [START], "<s>"),
    ("<s>", [START], "<s>"),
    (False, [], ""),
    ("<|endoftext|>", [END], "<|endoftext|>"),
    ("<pad>", [PAD], "<pad>"),
    ("w7", [7], "w7"),
]


@pytest.fixture(scope="module", params=ANY_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(shared: Any, kind: str) -> Any:
    """A model whose BOS is `<s>`, which its tokenizer does not add."""
    return shared("llama", kind)


@pytest.fixture(scope="module")
def adding(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model with a tokenizer that adds `<s>` itself, as that of Llama does."""
    loaded = load_folder(write_folder("llama", tmp_path_factory.mktemp("adding")), kind=kind)
    inner = loaded.tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", START)]
    )
    assert loaded.tokenizer("w5")["input_ids"] == [START, 5]
    loaded.cfg.tokenizer_prepends_bos = True  # which TransformerLens finds out as it loads one
    return loaded


@pytest.mark.parametrize(("front", "ids", "told"), FRONTS, ids=lambda value: str(value))
def test_the_ids_in_front_are_those_asked_for(
    model: Any, adding: Any, front: Any, ids: list[int], told: str
) -> None:
    for lens in map(as_lens, (model, adding)):
        assert lens.encode("w5 w9", prepend_bos=front) == [*ids, 5, 9]
        read = read_prompts(lens, ["w5 w9", "w8"], prepend_bos=front)
        assert read.ids == ((*ids, 5, 9), (*ids, 8))
        assert read.prepended == told
        asked = read_questions(lens, [Prompt("w5 w9", " w11")], prepend_bos=front)
        assert (asked.prompts.ids, asked.answers) == (((*ids, 5, 9),), ((11,),))


@pytest.mark.parametrize(("front", "ids", "told"), FRONTS, ids=lambda value: str(value))
def test_a_run_is_that_of_the_ids_and_says_what_stands_in_front(
    model: Any, front: Any, ids: list[int], told: str
) -> None:
    _, wanted = run_with_ra(model, torch.tensor([[*ids, 5, 9, 4]]), target=[[11, 12]])
    _, ra = run_with_ra(model, "w5 w9 w4", target="w11 w12", prepend_bos=front)
    assert torch.equal(ra.stack(), wanted.stack())
    assert (ra.info.prepended, wanted.info.prepended) == (told, None)
    assert f"tokens: up to {len(ids) + 5}, {told or 'nothing'} prepended\n" in repr(ra)
    assert f"tokens: up to {len(ids) + 5}\n" in repr(wanted)


def test_a_second_text_of_the_token_stands_where_it_was_written(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, ra = run_with_ra(model, "<s> w5", target=11, prepend_bos="<|endoftext|>")
    assert ra.str_tokens == [["<|endoftext|>", "<s>", "w5"]]


NOT_ONE = {
    "two tokens": ("w5 w6", r"prepend_bos='w5 w6', which is 2 tokens of .* \('w5' \+ 'w6'\)"),
    "nothing": ("", r"prepend_bos='', which is 0 tokens of \S+\. Give one token"),
    "a blank": (" ", r"prepend_bos=' ', which is 0 tokens"),
    "unknown": ("zebra", r"prepend_bos='zebra', which .* does not know: .* reads it as <pad>"),
    "two, one of them special": ("<s>w5", r"prepend_bos='<s>w5', which is 2 tokens"),
    "half a character": ("\udc80", r"prepend_bos has half a character"),
}


@pytest.mark.parametrize("case", NOT_ONE)
def test_what_is_not_one_token_is_refused_with_what_to_give(model: Any, case: str) -> None:
    front, message = NOT_ONE[case]
    pairs = tuple(Pair(f"w{i}", f"w{i + 1}") for i in range(4, 30))
    task = Task("own", "icl", pairs, "", "")
    for call in (
        lambda: run_with_ra(model, "w5", prepend_bos=front),
        lambda: trace_paths(model, "w5", prepend_bos=front),
        lambda: rank_heads(model, [Prompt("w5", " w6")], prepend_bos=front),
        lambda: rank_tasks(model, task, prepend_bos=front, progress=False),
        lambda: perturbation_test(model, task, prepend_bos=front, progress=False),
        lambda: patching_sweep(model, task, prepend_bos=front, at_least=1, progress=False),
    ):
        with pytest.raises(BadInput, match=message) as found:
            call()
    if "half" not in case:
        for part in ("'<s>'", "True for BOS, or False for nothing"):
            assert part in str(found.value)


@pytest.mark.parametrize("number", [0, 1, 7, 1.0])
def test_an_id_is_not_taken_for_true(model: Any, number: Any) -> None:
    lens = as_lens(model)
    message = rf"found prepend_bos={number}; give True \(BOS\), False .*a token as text"
    refused(
        unchecked(type(lens).encode), {"self": lens, "text": "w5", "prepend_bos": number}, message
    )


def test_a_token_with_ids_is_refused(model: Any) -> None:
    with pytest.raises(BadInput, match=r"found prepend_bos='<s>' with token ids"):
        run_with_ra(model, [5, 6], target=11, prepend_bos="<s>")


def test_rankings_read_what_stands_in_front(model: Any) -> None:
    prompts = (Prompt("w5 w9", " w11"), Prompt("w4", " w12"))
    lens = as_lens(model)
    context = RankingContext(lens, model, prompts, prepend_bos="<|endoftext|>")
    assert context.questions.prompts.ids == ((END, 5, 9), (END, 4))
    scores = rank_heads(model, prompts, method="ra", prepend_bos="<|endoftext|>").scores
    norms = [
        run_with_ra(model, torch.tensor([ids]), target=sequence_nll([[answer]]))[1].norms("ra")[0]
        for ids, answer in (([END, 5, 9], 11), ([END, 4], 12))
    ]
    assert torch.allclose(scores, sum(norms).double() / 2, rtol=1e-5)
    other = rank_heads(model, prompts, method="ra", prepend_bos=True).scores
    assert not torch.allclose(scores, other, rtol=1e-2)


def test_paths_end_at_the_token_in_front(model: Any) -> None:
    text = "w5 <|endoftext|> w9 w4"
    maps = read_maps(model, text, prepend_bos="<|endoftext|>")[0]
    assert maps.tokens == ("<|endoftext|>", "w5", "<|endoftext|>", "w9", "w4")
    assert maps.bos == {0, 2}
    _, ra = run_with_ra(model, text, target=11, prepend_bos="<|endoftext|>")
    assert read_maps(ra)[0].bos == {0, 2}
    assert read_maps(model, text, prepend_bos=True)[0].bos == {0}
    assert read_maps(model, f"<s> {text}", prepend_bos=False)[0].bos == {0}
    assert read_maps(model, text, prepend_bos="<|endoftext|>", bos_token_id=9)[0].bos == {3}


def test_a_report_says_it_and_its_predictions_read_the_same(model: Any, tmp_path: Path) -> None:
    prompt = "w5 w9 w4"
    _, ra = run_with_ra(model, prompt, target="w11", prepend_bos="<|endoftext|>")
    found = patched_predictions(model, prompt, ra, target="w11", scale=0.0)[0]
    with torch.no_grad():
        likely = model(torch.tensor([[END, 5, 9, 4]]))[0, -1].softmax(-1)
    assert found.before.target == pytest.approx(float(likely[11]), rel=1e-4)
    page = write_report(ra, tmp_path / "report.html", patched=[found]).read_text("utf-8")
    assert "4, &lt;|endoftext|&gt; prepended" in page


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [None, False, "<|endoftext|>", "w7"])
def test_a_saved_cache_knows_it(model: Any, front: Any, tmp_path: Path) -> None:
    _, ra = run_with_ra(model, "w5 w9", target=11, prepend_bos=front)
    ra.save(tmp_path / "cache")
    assert RACache.load(tmp_path / "cache").info == ra.info


def test_results_hold_the_token_and_tables_of_several_can_be_written(
    model: Any, tmp_path: Path
) -> None:
    pairs = tuple(Pair(f"w{i}", f"w{i + 1}") for i in range(4, 30))
    task = Task("own", "icl", pairs, "", "")
    options: dict[str, Any] = {"methods": ["ra"], "shots": 0, "n_rank": 2, "progress": False}
    fronts = (None, True, False, "<|endoftext|>", "w7")
    for ending in (".parquet", ".csv"):
        frames: list[pd.DataFrame] = []
        for i, front in enumerate(fronts):
            out = tmp_path / f"{i}{ending}"
            frame = rank_tasks(model, task, prepend_bos=front, out=out, **options)
            assert list(frame["prepend_bos"].unique()) == [front]
            again = rank_tasks(model, task, prepend_bos=front, out=out, **options)
            assert _fronts(again) == [front] * len(frame)
            frames.append(frame)
            with pytest.raises(BadInput, match=r"other settings.*prepend_bos"):
                rank_tasks(model, task, prepend_bos="w8", out=out, **options)
        every = pd.concat(frames, ignore_index=True)
        write_results(every, tmp_path / f"every{ending}")
        assert list(every["prepend_bos"]) == [f for f in fronts for _ in range(len(frames[0]))]
        read = read_results(tmp_path / f"every{ending}")
        assert _fronts(read) == list(every["prepend_bos"])
        # With BOS by default, by its name or because it was asked for, the model reads the same.
        assert frames[0]["score"].tolist() == frames[1]["score"].tolist()
        assert frames[0]["score"].tolist() != frames[3]["score"].tolist()


def _fronts(frame: pd.DataFrame) -> list[Any]:
    return [None if pd.isna(value) else value for value in frame["prepend_bos"]]


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
@pytest.mark.parametrize("front", ["\n", "\t", " ", "1", "NA", "none", 'a"b,c', "נ", True, False])
def test_any_token_survives_a_table(front: Any, ending: str, tmp_path: Path) -> None:
    row = {"experiment": "ranking", "model": "m", "task": "t", "kind": "icl", "n_shots": 0}
    row |= {"method": "ra", "layer": 0, "head": 0, "score": 1.0, "rank": 1, "prepend_bos": front}
    write_results(pd.DataFrame([row]), tmp_path / f"t{ending}")
    found = read_results(tmp_path / f"t{ending}")["prepend_bos"]
    assert found.tolist() == [front]
    assert pd.api.types.is_bool_dtype(found) == isinstance(front, bool)
