"""Corrupted twins: the same question about something else, as long in tokens, with another answer.

What a head does for an answer can be told by giving it what it gives on another prompt. That other
prompt should differ in what the answer hangs on and in nothing else (Zhang and Nanda 2023,
arXiv 2309.16042, "symmetric token replacement"): here it has the same demonstrations and asks for
another pair of the task, whose input has as many tokens, so that positions correspond.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole
from ra_lens.tasks.task import Prompt, draw, stable_int

Encode = Callable[[str], Sequence[int]]


def with_corrupted(prompts: Iterable[Prompt], encode: Encode, *, seed: Whole = 0) -> list[Prompt]:
    """Give each prompt of a task a corrupted twin, `prompt.corrupted`.

    The twin asks for another pair of the task after the same demonstrations. Its prompt has as many
    tokens, and its answer begins with another token. It is none of the pairs demonstrated, as the
    query is not, and its input is not the query's. Which of those that fit, `seed` and the prompt
    decide, whatever list the prompt is in. Prompts that have a twin keep it.

    Args:
        prompts: From a task (`Task.build`, `Task.sample`, `Split.prompts`).
        encode: Turns a text into token ids, with what stands in front of it when the model reads
            it: `model.to_tokens(text)[0].tolist`, or a tokenizer's `encode`.
        seed: Another seed draws other twins, where several fit.

    Returns:
        The same prompts with their twins, in the order given.

    Raises:
        BadInput: a prompt of no task, or one for which no pair of its task fits.
    """
    seed = whole("seed", seed)
    return [
        replace(prompt, corrupted=prompt.corrupted or _twin(prompt, i, encode, seed))
        for i, prompt in enumerate(prompts)
    ]


def _twin(prompt: Prompt, i: int, encode: Encode, seed: int) -> Prompt:
    """Draw the twin of a prompt."""
    task, query = prompt.task, prompt.query
    own = "Give it one of your own: dataclasses.replace(prompt, corrupted=Prompt(text, answer))."
    if task is None or query is None:
        raise BadInput(
            f"prompt {i} ({prompt.text!r}) is of no task, of which another pair could be asked in "
            f"its place. {own}"
        )
    taken = {query.input, *(pair.input for pair in prompt.demonstrations)}
    pairs = list(
        dict.fromkeys(p for p in task.pairs if p.input not in taken and p.output != query.output)
    )
    length, answer = len(encode(prompt.text)), _first_token(prompt, encode)
    rng = random.Random(stable_int(task.name, seed, prompt.text, "corrupted"))
    for pair in draw(rng, pairs, len(pairs)):
        twin = task.build(pair, prompt.demonstrations)
        if len(encode(twin.text)) == length and _first_token(twin, encode) != answer:
            return twin
    raise BadInput(
        f"prompt {i} ({prompt.text!r}) has {length} tokens, and none of the {len(pairs)} other "
        f"pairs of task {task.name!r} makes one as long with another first token of the answer. "
        f"Leave the prompt out, or take pairs of one length (same_length_sets). {own}"
    )


def _first_token(prompt: Prompt, encode: Encode) -> int | None:
    """The first token that the answer adds; None where it adds none."""
    asked, solved = list(encode(prompt.text)), list(encode(prompt.text + prompt.answer))
    # A tokenizer may join the end of the question to the answer: then what differs first.
    differing = (new for old, new in zip([*asked, None], solved, strict=False) if old != new)
    return next(differing, None)
