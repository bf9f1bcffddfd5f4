"""Word-pair tasks and the prompts made from them; needs neither torch nor transformers.

A `Task` is a relation between words ("country" to "capital") with the way to ask for it. There are
two kinds. An ``icl`` task is asked as ``Q: France\\nA:`` and does not say which relation is meant:
the model has to infer it from solved demonstrations in front. A ``natural`` task is asked as a
sentence that names its relation, ``The capital city of France is``.

Example:
    ```python
    from ra_lens.tasks import load_task, task_names

    task = load_task("country-capital")
    for prompt in task.sample(3, shots=2, seed=0):
        print(prompt.text, "->", prompt.answer)

    split = task.split()  # 70 % train, 9 % valid, 21 % test
    questions = split.prompts("test", shots=5)  # demonstrations come from train
    ```
"""

from ra_lens.tasks.builtin import (
    held_out_prompts,
    is_held_out_adjacency,
    is_held_out_query,
    load_task,
    task_names,
)
from ra_lens.tasks.circuits import (
    CIRCUITS,
    Circuit,
    circuit_prompts,
    greater_than_prompts,
    induction_prompts,
    ioi_prompts,
    seen_tokens,
    year_tokens,
)
from ra_lens.tasks.corrupted import with_corrupted
from ra_lens.tasks.task import (
    Demonstrations,
    Pair,
    Part,
    Prompt,
    Split,
    SplitRule,
    Task,
    TaskKind,
    Unseen,
    same_length_sets,
)

__all__ = [
    "CIRCUITS",
    "Circuit",
    "Demonstrations",
    "Pair",
    "Part",
    "Prompt",
    "Split",
    "SplitRule",
    "Task",
    "TaskKind",
    "Unseen",
    "circuit_prompts",
    "greater_than_prompts",
    "held_out_prompts",
    "induction_prompts",
    "ioi_prompts",
    "is_held_out_adjacency",
    "is_held_out_query",
    "load_task",
    "same_length_sets",
    "seen_tokens",
    "task_names",
    "with_corrupted",
    "year_tokens",
]
