"""Sets of pairs whose questions have the same number of tokens, for patching whole maps.

A map of attention can be added to another one where both have the same size. The rule of Katz &
Wolf, "Reversed Attention", for GPT-2's tokenizer: of a task, keep the pairs whose answer is one
token, put together those whose question and answer have the same number of tokens, and keep the
sets of at least 100 pairs. Here it is for any tokenizer, and for answers of any number of tokens.

Cost: the tokenizer reads each pair twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ra_lens.numbers import Whole, whole
from ra_lens.tasks.task import Pair, Task


def same_length_sets(
    task: Task,
    encode: Callable[[str], Sequence[int]],
    *,
    answer_tokens: Whole = 1,
    at_least: Whole = 100,
) -> dict[int, Task]:
    """Return the sets of pairs that are asked and answered in the same number of tokens.

    A pair is kept where its answer goes on from the question: the ids of question and answer are
    those of the question without demonstrations and `answer_tokens` more. (A tokenizer that joins
    the end of the question to the answer gives other ids.) The sets are disjoint.

    Questions with n demonstrations of the same set have one length too, for each n, as long as the
    tokenizer reads every solved example alike wherever it stands: nothing is joined across
    `Task.separator`, and what stands in front of an example (nothing or a BOS token for the first
    one, a line break for the others) changes its number of tokens for all pairs or for none. That
    holds for GPT-2, OPT and Llama with the default format, and may fail for a natural question that
    begins with its subject; count the tokens to be sure.

    Args:
        task: the task to take pairs from, in the format in which it will be asked.
        encode: turns a text into token ids, with BOS where the model gets one, since the lengths
            count whatever it gives.
        answer_tokens: number of tokens of the answer with its leading space.
        at_least: number of pairs that a set needs to be kept.

    Returns:
        By number of tokens of question and answer together, smallest first, a task with those
        pairs in the order of `task`, named `{name}_len_{tokens}_{answer_tokens}`. Its `split` is
        the published one for that set. Empty where no set is large enough.

    Raises:
        BadInput: `answer_tokens` or `at_least` is below 1, or no whole number.
    """
    answer_tokens = whole("answer_tokens", answer_tokens, least=1)
    at_least = whole("at_least", at_least, least=1)
    groups: dict[int, list[Pair]] = {}
    for pair in task.pairs:
        question = task.prompt(pair)
        asked = list(encode(question))
        solved = list(encode(question + task.answer(pair)))
        if solved[: len(asked)] == asked and len(solved) - len(asked) == answer_tokens:
            groups.setdefault(len(solved), []).append(pair)
    return {
        length: replace(
            task, name=f"{task.name}_len_{length}_{answer_tokens}", pairs=tuple(groups[length])
        )
        for length in sorted(groups)
        if len(groups[length]) >= at_least
    }
