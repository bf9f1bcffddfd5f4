"""What a model, a task, a method and prompts are, in short texts that settings and rows hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ra_lens.errors import BadInput
from ra_lens.experiments.journal import settings_hash
from ra_lens.experiments.own_code import Untold, code_hash
from ra_lens.heads import BUILT_IN_METHODS, RankingMethod
from ra_lens.heads.registry import find_method
from ra_lens.model import Lens, PrependBos
from ra_lens.tasks import Prompt, Task


def model_facts(lens: Lens) -> dict[str, Any]:
    """Tell which model, in which class and precision, with which versions of what runs it."""
    some = next(lens.module.parameters())
    packages = ("ra-lens", "transformer-lens", "transformers", "torch")
    return {
        "model": lens.name,
        "model_class": lens.kind,
        "dtype": str(some.dtype).removeprefix("torch."),
        "device": some.device.type,
        "weights_hash": weights_hash(lens.module),
        "value_biases_folded": lens.value_biases_folded,
        **{name.replace("-", "_"): version(name) for name in packages},
    }


def task_facts(task: Task) -> dict[str, str]:
    """Tell what a task is: another list or format is another task, whatever its name."""
    form = [task.opening, task.before_subject, task.after_subject, task.separator]
    return {
        "source": task.source,
        "format": json.dumps(form, ensure_ascii=False),
        "pairs_hash": prompts_hash([Prompt(pair.input, pair.output) for pair in task.pairs]),
    }


def task_settings(lens: Lens, task: Task, prepend_bos: PrependBos) -> dict[str, Any]:
    """Tell what a task is to a model: the tokens read are among it."""
    first = [task.prompt(pair) + task.answer(pair) for pair in task.pairs[:8]]
    tokens = [lens.encode(text, prepend_bos=prepend_bos) for text in first]
    return {"name": task.name, **task_facts(task), "tokens": settings_hash({"ids": tokens})}


def methods_facts(names: Iterable[str], out: str | Path | None) -> list[dict[str, Any]]:
    """Tell which methods these are: one's own by what they do, as their names may be another's.

    Raises:
        BadInput: `out`, to which such results would go, and a method that cannot be told.
    """
    return [_method_facts(find_method(name), out) for name in names]


def _method_facts(method: RankingMethod, out: str | Path | None) -> dict[str, Any]:
    facts = {"name": method.name, "split": method.split, "random": method.random}
    if method == BUILT_IN_METHODS.get(method.name):
        return facts
    needs = {} if method.needs is None else asdict(method.needs)
    try:
        code = code_hash(method.function)
    except Untold as error:
        if out is not None:
            raise BadInput(
                f"found method {method.name!r}, which computes with {error}, and out=: what that "
                "does is not told, and results are found again by it. Register a function (def) "
                "that has numbers, texts, lists or tensors from around it and as defaults; or "
                "leave out= away and write the table with write_results."
            ) from error
        code = None
    return {**facts, "twins": method.twins, **needs, "code": code}


def weights_hash(model: nn.Module) -> str:
    """Give a short text that tells the weights of most models apart.

    Of each parameter: at most 64 numbers, spread evenly, and the sum of all absolute values in
    seven digits. Training shows. What does not: other signs or places of numbers that are not among
    the 64, and whatever changes the sum by less than a part in ten million. Results that people
    keep are found again by it, so it stays as it is.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        n = values.numel()
        if n == 0:
            continue
        count = min(64, n)
        picked = [i * (n - 1) // max(count - 1, 1) for i in range(count)]
        numbers = values[torch.tensor(picked, device=values.device)].float().tolist()
        # Few digits: sums differ in the last ones with the number of threads.
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        total = float(values.abs().sum(dtype=wide))
        digest.update(f"{name}{tuple(parameter.shape)}{numbers}{total:.6e}".encode())
    return digest.hexdigest()


def prompts_hash(*groups: Sequence[Prompt]) -> str:
    """Give a short text that tells prompts apart, by what a model reads and has to answer."""
    digest = hashlib.blake2b(digest_size=8)
    for prompts in groups:
        for prompt in prompts:
            digest.update(f"{prompt.text}\x1f{prompt.answer}\x1e".encode())
            if prompt.corrupted is not None:
                corrupted = prompt.corrupted
                digest.update(f"\x1c{corrupted.text}\x1f{corrupted.answer}\x1e".encode())
        digest.update(b"\x1d")
    return digest.hexdigest()
