"""Numbers and heads of every form, wherever the public functions ask for one.

The oracle of a call is the same call with Python's own numbers.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ra_lens import RACache, best_scale, perturbation_test, rank_heads, run_with_ra, trace_paths
from ra_lens.errors import BadInput
from ra_lens.experiments import patching_sweep, rank_tasks
from ra_lens.figures import (
    auc_table,
    head_grid,
    head_map,
    head_maps,
    path_diagram,
    perturbation_curves,
    query_key_pull,
    token_row,
)
from ra_lens.head_maps import head_of_example, read_heads
from ra_lens.head_names import HeadScore
from ra_lens.heads import HeadScores
from ra_lens.patching.masking import mask_heads
from ra_lens.patching.mean import MeanMaps
from ra_lens.paths import TraceResult, read_maps, trace_layers
from ra_lens.report import patched_predictions, write_report
from ra_lens.scales import BestScale
from ra_lens.tasks import Split, Task, held_out_prompts, load_task, same_length_sets
from refused import unchecked
from tiny_models import KINDS, N_HEADS, N_LAYERS, random_ids, text
from toys import knowing_task, load_toy

IDS = random_ids(3, 7)


def numpy_scalar(value: Any) -> Any:
    return np.float64(value) if isinstance(value, float) else np.int64(value)


def generator(values: Any) -> Any:
    return (value for value in values)


# What makes one number of a library, and several.
FORMS = {
    "NumPy": (numpy_scalar, np.array),
    "torch": (torch.tensor, torch.tensor),
    "arrays without dimensions": (np.array, pd.Series),
    "generators": (numpy_scalar, generator),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_toy(tmp_path_factory.mktemp("toy"), KINDS[0])


@pytest.fixture(scope="module")
def model(shared: Any) -> Any:
    return shared("llama", KINDS[0])


@pytest.fixture(scope="module")
def ra(model: Any) -> RACache:
    return run_with_ra(model, IDS, target=5, progress=False)[1]


def plain(value: Any) -> Any:
    return value


# ---- experiments --------------------------------------------------------------------------------


def experiments(toy: Any, one: Any, many: Any) -> dict[str, pd.DataFrame]:
    task = knowing_task()
    quiet = {"progress": False, "seed": one(3), "batch_size": one(5)}
    return {
        "perturbation": perturbation_test(
            toy, task, methods=["index", "random"], shots=many([0, 1]), step=one(0.5),
            random_orders=one(2), n_rank=one(2), n_test=one(3), rank_shots=one(1), **quiet,
        ),
        "patching": patching_sweep(
            toy, task, scales=many([-30.0, 1.0]), shots=many([0]), n_mean=one(2), n_test=one(3),
            length=one(3), at_least=one(5), prepend_bos=True, **quiet,
        ),
        "ranking": rank_tasks(
            toy, task, methods=["cm2", "random"], shots=many([2]), n_rank=one(2), **quiet
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def of_experiments(toy: Any) -> dict[str, pd.DataFrame]:
    return experiments(toy, plain, plain)


@pytest.mark.parametrize("form", FORMS)
def test_experiments_take_numbers_of_every_library(
    toy: Any, of_experiments: dict[str, pd.DataFrame], form: str
) -> None:
    for name, frame in experiments(toy, *FORMS[form]).items():
        pd.testing.assert_frame_equal(frame, of_experiments[name], check_exact=True)


WRONG = [
    (perturbation_test, {"seed": 1.5}, r"found seed=1\.5; give a whole number"),
    (perturbation_test, {"seed": "1"}, r"found seed='1'; give a whole number"),
    (perturbation_test, {"n_rank": True}, r"found n_rank=True; give a whole number"),
    (perturbation_test, {"n_rank": np.int64(0)}, "found n_rank=0; give at least 1"),
    (perturbation_test, {"n_test": 2.0}, r"found n_test=2\.0; give a whole number"),
    (perturbation_test, {"random_orders": 0}, "found random_orders=0; give at least 1"),
    (perturbation_test, {"rank_shots": -1}, "found rank_shots=-1; give at least 0"),
    (perturbation_test, {"batch_size": 0}, "found batch_size=0; give at least 1"),
    (perturbation_test, {"step": "0.5"}, r"found step='0\.5'; give a number"),
    (perturbation_test, {"shots": np.array([0.5])}, r"found shots=.*0\.5.*; give a whole number"),
    (perturbation_test, {"shots": torch.tensor([1, 1])}, r"found shots=\[1, 1\]; give different"),
    (perturbation_test, {"shots": np.array([], int)}, "found shots without a number in it"),
    (perturbation_test, {"prepend_bos": np.bool_(True)}, r"prepend_bos=.*True.*written down"),
    (rank_tasks, {"shots": "01"}, "found shots='01'; give a whole number, or several in a list"),
    (rank_tasks, {"n_rank": None}, "found n_rank=None; give a whole number from 1 on"),
    (patching_sweep, {"scales": np.array([])}, "found scales without a number in it"),
    (patching_sweep, {"scales": [1, np.nan]}, "found scales=nan; give a finite number"),
    (patching_sweep, {"scales": [1, np.float32(1)]}, r"found scales=\[1\.0, 1\.0\]; give each"),
    (patching_sweep, {"n_mean": 0}, "found n_mean=0; give at least 1"),
    (patching_sweep, {"length": "6"}, "found length='6'; give a whole number"),
    (patching_sweep, {"at": "values"}, "found at='values'; give 'pattern' or 'scores'"),
    (
        patching_sweep,
        {"kinds": np.array(["ra", "fa"])},
        "give 'ra', 'pattern', 'shuffled', 'grad', 'centred_grad', 'a_grad' or several",
    ),
]


def _name(value: Any) -> str:
    # Of a function without its address, which differs between the processes of a run.
    return getattr(value, "__name__", None) or str(value)


@pytest.mark.parametrize(("function", "options", "message"), WRONG, ids=_name)
def test_what_cannot_be_used_is_said_before_any_work(
    toy: Any, function: Any, options: dict[str, Any], message: str
) -> None:
    def work(*_args: Any) -> None:
        raise AssertionError("the model was run")

    options = {"shots": [0], "at_least": 5, "prepend_bos": True, "progress": False, **options}
    if function is not patching_sweep:
        options.pop("at_least")
    handle = toy.register_forward_pre_hook(work)
    try:
        with pytest.raises(BadInput, match=message):
            function(toy, knowing_task(), **options)
    finally:
        handle.remove()


# ---- everything else ----------------------------------------------------------------------------


def everything_else(model: Any, ra: RACache, one: Any, many: Any, tmp_path: Any) -> dict[str, Any]:
    """What each function gives, in a form that can be compared."""
    task, demo_task = knowing_task(), load_task("antonym")
    prompts = task.sample(3, shots=2)
    split = task.split(seed=one(7))
    scores = rank_heads(
        model, prompts, method="random", seed=one(2), draw=one(1), batch_size=one(2)
    )
    trace = trace_paths(
        model, IDS[0], target_pos=one(-2), layer=one(1), top_beam=one(3), top_k=one(4),
        min_attn=one(0.01), agg_heads=one(2), bos_token_id=one(3),
    )  # fmt: skip
    layered = trace_layers(
        ra, layers=many([0, 2]), follow="abs", target_pos=one(-1), top_beam=one(2),
        residual=one(0.25), example=one(1),
    )  # fmt: skip
    _, some = run_with_ra(
        model, IDS, target=5, layers=many([0, -1]), batch_size=one(2), position=one(-2),
        softmax_scale=one(0.5), progress=False,
    )  # fmt: skip
    _, placed = run_with_ra(model, IDS, target=5, position=many([1, 2, 3]), store="norms")
    hooks = ra.mean().patch_hooks(scale=one(-3.0), layers=many([0, 2]), rows=many([-1, 2]))
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        patched = model(IDS)
    size = {"width": one(700), "height": one(400)}
    shown = {"example": one(1), "max_tokens": one(5)}
    report = write_report(
        ra, tmp_path / "a.html", top=one(3), examples=many([2, 0]), max_tokens=one(5),
        max_megabytes=one(1.0),
    )  # fmt: skip
    curves = pd.DataFrame(
        [
            {"model": "m", "task": "t", "n_shots": 0, "method": "ra", "direction": "forward",
             "draw": 0, "share": share, "top1": share, "kind": "icl", "auc": 0.5}
            for share in (0.0, 1.0)
        ]
    )  # fmt: skip
    figures = [
        head_map(ra, (1, 2), limit=one(0.5), **shown, **size),
        head_maps(ra, [(1, 2), (0, 1)], columns=one(1), **shown, **size),
        head_grid(ra, top=one(3), **size),
        token_row(ra, (1, 2), query=one(-2), limit=one(0.5), **shown, **size),
        query_key_pull(ra, (1, 2), k=one(4), **shown, **size),
        path_diagram(trace, n_paths=one(2), **size),
        perturbation_curves(curves, **size),
        auc_table(curves.iloc[:1], **size),
    ]
    prompt, target = text(IDS[0]), text([9])
    _, own = run_with_ra(model, prompt, target=target)
    predictions = patched_predictions(
        model, prompt, own, target=target, scale=one(-3.0), top=one(2)
    )
    found = best_scale(
        model, ra, IDS, 5, scales=many([-3, 2]), batch_size=one(4), layers=many([0, 2]),
        rows=many([-1, 2]), progress=False,
    )  # fmt: skip
    return {
        "scales": (found.scales, found.of_prompts(many([2, 0])).losses.tolist()),
        "at a scale": (found.loss_at(one(-3)), found.probability_at(one(2))),
        "prompts": task.sample(one(3), shots=one(2), seed=one(4)),
        "split": (split.train, split.test),
        "of a part": split.prompts("test", shots=one(1), n=one(2), seed=one(4)),
        "held out": held_out_prompts(demo_task, one(2), shots=one(1), seed=one(4)),
        "lengths": same_length_sets(
            task, lambda text: text.split(), answer_tokens=one(1), at_least=one(2)
        ).keys(),
        "scores": scores.scores.tolist(),
        "top": scores.top(one(2)),
        "kept": scores.keep_mask(one(5)).tolist(),
        "top heads": ra.top_heads(one(3)),
        # beartype asks for the length of whatever can be iterated over.
        "group": unchecked(RACache.kv_group)(ra, one(3)),
        "trace": trace.to_json(),
        "of a gradient": trace_layers(
            model, IDS[0], layers=many([0, 2]), follow="abs", target=5
        ).to_json(),
        "many": [
            trace_paths(maps, layer=one(-1), top_beam=one(1)).to_json()
            for maps in read_maps(model, IDS, layers=many([1, 2]), batch_size=one(2))
        ],
        "layered": layered.to_json(),
        "heads": layered.heads(one(1)),
        "layers": some.layers,
        "maps": some["ra", 0].tolist(),
        "positions": placed.norms().tolist(),
        "patched": patched.tolist(),
        "report": report.read_text(encoding="utf-8"),
        "figures": [figure.to_json() for figure in figures],
        "predictions": predictions,
    }


@pytest.fixture(scope="module")
def of_everything_else(
    model: Any, ra: RACache, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return everything_else(model, ra, plain, plain, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("form", FORMS)
def test_every_function_takes_numbers_of_every_library(
    model: Any, ra: RACache, of_everything_else: dict[str, Any], form: str, tmp_path: Any
) -> None:
    for name, value in everything_else(model, ra, *FORMS[form], tmp_path).items():
        assert value == of_everything_else[name], name


# What people call, by module. Results (dataclasses) are made by us, with numbers of Python's.
MODULES = ("ra_lens", "ra_lens.experiments", "ra_lens.figures", "ra_lens.heads", "ra_lens.patching",
           "ra_lens.patching.masking", "ra_lens.paths", "ra_lens.report",
           "ra_lens.tasks")  # fmt: skip
CLASSES = (BestScale, RACache, HeadScores, MeanMaps, Task, Split, TraceResult)


def test_no_public_function_asks_for_numbers_of_pythons_only() -> None:
    found: set[Any] = set()
    for name in MODULES:
        module = import_module(name)
        names = getattr(module, "__all__", ["mask_heads", "mask_hooks"])
        found |= {thing for n in names if inspect.isfunction(thing := getattr(module, n))}
    for cls in CLASSES:
        found |= {thing for n, thing in vars(cls).items() if inspect.isfunction(thing)}
    others = {"encode", "batch_slice"}  # a function; what indexes a list
    for function in found:
        if function.__name__.startswith("_"):
            continue
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in others:
                continue
            # A key of a dict is looked up, which every integer of NumPy can be.
            annotation = str(parameter.annotation).replace("Mapping[int", "Mapping[Whole")
            named = re.findall(r"\b(?:int|float)\b", annotation)
            assert not named, (function.__qualname__, str(parameter))


# ---- heads --------------------------------------------------------------------------------------


HEAD_FORMS = ["L1H2", (1, 2), [1, 2], HeadScore(1, 2, 0.0), np.array([1, 2]),
              torch.tensor([1, 2]), (np.int64(1), torch.tensor(2)), pd.Series([1, 2])]  # fmt: skip


@pytest.mark.parametrize("head", HEAD_FORMS, ids=lambda head: type(head).__name__)
def test_a_head_is_read_as_it_is_printed_and_in_every_other_form(
    model: Any, ra: RACache, head: Any
) -> None:
    assert ra.kv_group(head) == ra.kv_group(2) == 1
    assert head_of_example(ra, head).label == "L1H2"
    # One alone will do where several are asked for.
    assert read_heads(ra, head) == [(1, 2)]
    assert read_heads(ra, [head, "L0H1"]) == [(1, 2), (0, 1)]
    traced = trace_paths(model, IDS[0], layer=1, agg_heads=head)
    assert traced.to_json() == trace_paths(model, IDS[0], layer=1, agg_heads=2).to_json()

    def logits(hooks: Any) -> torch.Tensor:
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            return model(IDS)

    def only_one(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, 2] = 0
        return z

    masked = logits([("blocks.1.attn.hook_z", only_one)])
    for heads in (head, [head], (one for one in [head])):
        torch.testing.assert_close(logits(mask_heads(model, heads)), masked)
    mean = ra.mean()
    patched = logits(mean.patch_hooks(scale=-30, heads=[(1, 2)]))
    torch.testing.assert_close(logits(mean.patch_hooks(scale=-30, heads=head)), patched)


def test_figures_take_a_head_as_it_is_printed(ra: RACache) -> None:
    for draw in (head_map, head_maps, token_row, query_key_pull):
        assert draw(ra, "L1H2").to_json() == draw(ra, (1, 2)).to_json()


def test_labels_of_a_table_are_heads(model: Any, ra: RACache) -> None:
    frame = rank_heads(model, [], method="index").to_dataframe()
    labels = frame["label"][:2]
    assert read_heads(ra, labels) == [(0, 0), (0, 1)]
    assert [name for name, _ in mask_heads(model, labels)] == ["blocks.0.attn.hook_z"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ra: head_map(ra, "L1H4"), r"layer=1, head=4\).*heads 0 to 3.*'L2H3'"),
        (lambda ra: head_map(ra, "L9H0"), r"layer=9, head=0\); this cache has layers \[0, 1, 2\]"),
        (lambda ra: head_map(ra, "2.3"), r"found '2\.3' among heads.*'L3H5'"),
        (lambda ra: unchecked(RACache.kv_group)(ra, (1, 2.0)), r"found \(1, 2\.0\) among heads"),
        (lambda ra: ra.kv_group("L3H0"), r"found head L3H0; this cache has layers \[0, 1, 2\]"),
        (lambda ra: ra.kv_group("L2H4"), "found head L2H4; layer 2 has heads 0 to 3"),
        (lambda ra: ra.kv_group("head 3"), "found 'head 3' among heads"),
        (
            lambda ra: trace_paths(ra, example=0, layer=1, agg_heads="L2H3"),
            "agg_heads='L2H3', but the layer traced is 1",
        ),
        (
            lambda ra: trace_paths(ra, example=0, layer=1, agg_heads="L1H4"),
            "agg_heads=4; this layer has heads 0 to 3",
        ),
    ],
)
def test_heads_that_are_not_there_are_named(ra: RACache, call: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call(ra)


def test_the_sizes_above_are_those_of_the_model(ra: RACache) -> None:
    assert (len(ra.layers), ra.n_heads) == (N_LAYERS, N_HEADS)
