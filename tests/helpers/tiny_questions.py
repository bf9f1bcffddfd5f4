"""Questions in words of the tiny models."""

from __future__ import annotations

from ra_lens.tasks import Pair, Prompt, Task

# Different lengths, answers of one and two tokens; the word is its id.
WORDS = [([3, 5, 7], [9]), ([4, 6], [8, 10]), ([11, 12, 13, 14, 15], [16])]
PROMPTS = [
    Prompt(" ".join(f"w{i}" for i in ids), "".join(f" w{i}" for i in answer))
    for ids, answer in WORDS
]
TASK = Task(
    name="toy",
    kind="icl",
    pairs=tuple(Pair(f"w{i}", f"w{i + 10}") for i in range(3, 12)),
    before_subject="w30 ",
    after_subject=" w31",
    separator=" ",
)
