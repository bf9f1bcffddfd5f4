"""Which tokens do maps point to? Against questions whose evidence is known, beside other methods.

    python -m benchmarks.pointing                                # on the embedded model
    python -m benchmarks.pointing --model smollm2-135m --front "<|endoftext|>"

Each method gives every token of a prompt one number. It hits where the largest, the token in front
and the last one left aside, is part of the evidence:

* lists, each item as the target: a list of three words and, in turn, each of them as what the loss
  asks for. The evidence is that item, whatever the model would say: where to look to say it.
* lists, the answer: the item that the task asks for.
* copy: the word that is to be written with a capital letter.
* recall: the country whose capital is asked for. Here the answer is not in the prompt.

Targets are first tokens. The methods need one forward and one backward pass, but for integrated
gradients, which need as many as there are steps, and are those of captum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens import RACache, load_demo_model, load_model, load_task, run_with_ra
from ra_lens.knockouts.edges import find_text
from ra_lens.model import as_lens
from ra_lens.token_scores import TOKEN_METHODS, token_scores

STEPS = 20  # of integrated gradients


@dataclass(frozen=True)
class Asked:
    """A prompt, the token that the loss asks for, and the tokens that are its evidence."""

    kind: str
    text: str
    target: int
    evidence: str


def questions(model: nn.Module, n: int) -> list[Asked]:
    """Prompts of four kinds, `n` of each (of the first kind three times as many)."""
    lens = as_lens(model)

    def token(word: str) -> int:
        return lens.encode(f" {word.strip()}", prepend_bos=False)[0]

    found: list[Asked] = []
    lists = load_task("choose_middle_of_3").split("code").prompts("test", shots=0, n=n, seed=0)
    for prompt in lists:
        assert prompt.query is not None
        for item in prompt.query.input.split(", "):
            found.append(Asked("lists, each item", prompt.text, token(item), item))
        answer = prompt.answer.strip()
        found.append(Asked("lists, the answer", prompt.text, token(answer), answer))
    for kind, name in (("copy", "capitalize"), ("recall", "natural/country-capital")):
        split = load_task(name).split("code")
        for prompt in split.prompts("test", shots=0, n=min(n, len(split.test)), seed=0):
            assert prompt.query is not None
            found.append(Asked(kind, prompt.text, token(prompt.answer), prompt.query.input))
    return found


# ---- methods ------------------------------------------------------------------------------------


def chefer(
    pattern: Float[Tensor, "layer head query key"], grad: Float[Tensor, "layer head query key"]
) -> Float[Tensor, "pos"]:
    """Relevance of Chefer et al. (2021): R ← R + mean over heads of (−A ⊙ G)₊ · R."""
    seen = torch.eye(pattern.shape[-1], dtype=pattern.dtype)
    for layer in (-pattern * grad).clamp(min=0).mean(dim=1):
        seen = seen + layer @ seen
    return seen[-1]


def embedding(model: nn.Module) -> nn.Module:
    """The module whose output is the stream of embeddings, as far as it is known by tokens."""
    return model.get_submodule("embed")


def chance_of(model: Any, target: int) -> Callable[[Tensor], Tensor]:
    """The log-probability of the target at the last token, as a function of token ids."""
    return lambda ids: model(ids)[:, -1].log_softmax(dim=-1)[:, target]


def input_times_gradient(model: Any, ids: Tensor, target: int) -> Float[Tensor, "pos"]:
    """Σ x · ∂log p/∂x over the entries of each token's embedding."""
    held: list[Tensor] = []

    def begin(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    handle = embedding(model).register_forward_hook(begin)
    try:
        with torch.enable_grad():
            total = chance_of(model, target)(ids).sum()
            (grad,) = torch.autograd.grad(total, held)
    finally:
        handle.remove()
    return (held[0] * grad).sum(dim=-1)[0].detach()


def integrated_gradients(model: Any, ids: Tensor, target: int) -> Float[Tensor, "pos"]:
    """Captum's, at the embeddings, from those of a prompt that is its first token throughout."""
    from captum.attr import LayerIntegratedGradients  # heavy, and not part of the package

    method: Any = LayerIntegratedGradients(chance_of(model, target), embedding(model))
    nothing = torch.full_like(ids, int(ids[0, 0]))
    with torch.enable_grad():
        found: Tensor = method.attribute(
            ids, baselines=nothing, n_steps=STEPS, internal_batch_size=4
        )
    return found.sum(dim=-1)[0].detach()


def of_maps(model: nn.Module, ra: RACache) -> dict[str, Float[Tensor, "pos"]]:
    """What maps of one prompt give each token, larger where it is to be looked at."""
    scores = {kind: token_scores(ra, method=kind, model=model)[0] for kind in TOKEN_METHODS}
    return {
        "−R": scores["ra"],
        "knockout": scores["knockout"],
        "−A·G": ra.flow(by="cut")[0].sum(dim=0),
        "A": scores["pattern"],
        "A‖v W_O‖": scores["value_norm"],
        "rollout": scores["rollout"],
        "Chefer": chefer(ra.stack("pattern")[:, 0], ra.stack("pattern_grad")[:, 0]),
    }


# ---- measuring ----------------------------------------------------------------------------------


def measure(
    model: nn.Module, asked: Iterable[Asked], front: str | bool, *, captum: bool = True
) -> pd.DataFrame:
    """One row per question and method: whether it hits; `chance` is a token drawn at random."""
    rows: list[dict[str, Any]] = []
    for one in asked:
        _, ra = run_with_ra(
            model, one.text, target=one.target, vectors=["value"], prepend_bos=front, progress=False
        )
        assert ra.info.str_tokens is not None
        first = 1 if ra.info.prepended else 0
        evidence = find_text("evidence", one.evidence, ra.info.str_tokens[0])
        ids = torch.tensor([as_lens(model).encode(one.text, prepend_bos=front)])
        scores = of_maps(model, ra)
        scores["input × gradient"] = input_times_gradient(model, ids, one.target)
        if captum:
            scores["integrated gradients"] = integrated_gradients(model, ids, one.target)
        for method, values in scores.items():
            hit = int(values[first:-1].argmax()) + first in evidence
            rows.append({"kind": one.kind, "method": method, "hit": float(hit)})
        share = len(evidence) / (ids.shape[1] - first - 1)
        rows.append({"kind": one.kind, "method": "chance", "hit": share})
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows methods, columns kinds of question: the share of hits."""
    return frame.pivot_table(index="method", columns="kind", values="hit", sort=False)


def main(
    model: Annotated[str, typer.Option(help="As load_model takes it.")] = "demo",
    front: Annotated[str | None, typer.Option(help="The token in front.")] = None,
    n: Annotated[int, typer.Option(help="Questions of each kind.")] = 30,
) -> None:
    """Print the table."""
    loaded = load_demo_model() if model == "demo" else load_model(model)
    frame = measure(loaded, questions(loaded, n), True if front is None else front)
    wide = table(frame)
    counts = frame[frame.method == "chance"].groupby("kind", sort=False).size()
    print(f"Hits among {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
    print("| | " + " | ".join(map(str, wide.columns)) + " |")
    print("|---" * (1 + len(wide.columns)) + "|")
    for method, row in wide.iterrows():
        shares = (f"{share:.2f}".removeprefix("0") for share in row)
        print(f"| {method} | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    typer.run(main)
