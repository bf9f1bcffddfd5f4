"""Patch mean maps into zero-shot questions of every in-context task, on the embedded model.

For each task the maps of 25 questions are averaged and added to the attention on the other
questions: Reversed Attention times −30 and forward attention times 1, the paper's scales (section
5.3), untuned. The answer is held to be right if it is the top prediction.

    python examples/patch_every_task.py
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ra_lens import load_demo_model, load_task, run_with_ra
from ra_lens.tasks import Task, task_names

AVERAGED = 25
SCALES = {"ra": -30.0, "pattern": 1.0}


def accuracies(model: Any, task: Task, seed: int) -> dict[str, float]:
    """Accuracy on the questions that were not averaged: unpatched, and with each kind of map."""
    prompts = task.sample(len(task.pairs), seed=seed)
    # Questions of one task have one length here: every word of the embedded model is one token.
    learned, asked = prompts[:AVERAGED], prompts[AVERAGED:]
    _, ra = run_with_ra(
        model, [p.text for p in learned], target=[p.answer for p in learned], store="mean"
    )
    tokens = torch.cat([model.to_tokens(p.text) for p in asked])
    answers = torch.cat([model.to_tokens(p.answer, prepend_bos=False)[0] for p in asked])
    found: dict[str, float] = {}
    for name in ("zero-shot", *SCALES):
        hooks = ra.mean().patch_hooks(kind=name, scale=SCALES[name]) if name in SCALES else []
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            top = model(tokens)[:, -1].argmax(-1)
        found[name] = float((top == answers).float().mean())
    return found


def main(seed: Annotated[int, typer.Option(help="Which questions are averaged.")] = 0) -> None:
    """Print the accuracy per task."""
    model = load_demo_model()
    table = Table("task", "questions", "zero-shot", "RA × −30", "forward × 1")
    rows: list[dict[str, float]] = []
    for name in task_names("icl"):
        task = load_task(name)
        rows.append(accuracies(model, task, seed))
        cells = [f"{value:.2f}" for value in rows[-1].values()]
        table.add_row(name, str(len(task.pairs) - AVERAGED), *cells)
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    table.add_section()
    table.add_row("mean", "", *(f"{value:.2f}" for value in means.values()))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
