"""What a model, a task, a method and prompts are, in short texts that settings and rows hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from ra_lens.experiments.journal import settings_hash
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


def method_facts(name: str) -> dict[str, Any]:
    """Tell which method this is: a user's own by its code, as its name may be another's."""
    method = find_method(name)
    function: Any = method.function
    facts = {"name": method.name, "split": method.split, "random": method.random}
    if not str(function.__module__).startswith("ra_lens."):
        code = getattr(function, "__code__", None)
        parts = [getattr(code, part, None) for part in ("co_code", "co_consts", "co_names")]
        facts["code"] = settings_hash({"code": list(map(repr, parts))})
    return facts


def weights_hash(model: nn.Module) -> str:
    """Give a short text that tells the weights of two models apart.

    Of each parameter: some numbers, and the sum of all absolute values, so that every change of
    more than about a part in ten million shows.
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
