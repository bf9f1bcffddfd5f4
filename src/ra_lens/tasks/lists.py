"""The four tasks that pick one word out of three: generated from pools of words, not listed.

The pools overlap on purpose. A triple of one adjective and two verbs may come from
``adjective_v_verb_3`` (pick the adjective), ``choose_middle_of_3`` or ``alphabetically_first_3``,
so a triple alone does not say what is asked; only solved demonstrations do.

There are far more triples than a task lists, so that a model can be trained on many of them;
`ra_lens.tasks.held_out` says which it must not see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from ra_lens.tasks._stable import draw, pick, stable_int
from ra_lens.tasks.task import Pair

SEPARATOR = ", "

# Of the triples of the two tasks that do not look at what a word means, these shares have the
# form that the two other tasks ask about; what remains mixes all pools.
_ADJECTIVE_VERB_SHARE = 0.45
_ANIMAL_OBJECT_SHARE = 0.45

Pools = Mapping[str, tuple[str, ...]]
Triple = tuple[str, str, str]
Rule = Callable[[Triple, Pools], str]


def _adjective(words: Triple, pools: Pools) -> str:
    return next(word for word in words if word in pools["adjective"])


def _animal(words: Triple, pools: Pools) -> str:
    return next(word for word in words if word in pools["animal"])


def _middle(words: Triple, _pools: Pools) -> str:
    return words[1]


def _first(words: Triple, _pools: Pools) -> str:
    return min(words)


_RULES: Mapping[str, Rule] = {
    "adjective_v_verb_3": _adjective,
    "alphabetically_first_3": _first,
    "animal_v_object_3": _animal,
    "choose_middle_of_3": _middle,
}

LIST_TASKS = tuple(_RULES)


def list_pairs(name: str, pools: Pools, n: int, seed: int = 0) -> tuple[Pair, ...]:
    """Return `n` different triples of the list task `name`, each with its answer.

    Args:
        name: one of `LIST_TASKS`.
        pools: words by pool: "adjective", "verb", "animal" and "object".
        n: how many pairs; the first pairs do not depend on it.
        seed: another seed gives other triples.
    """
    rng = random.Random(stable_int("list task", name, seed))
    pairs: dict[str, Pair] = {}
    while len(pairs) < n:
        words = _draw_triple(name, pools, rng)
        text = SEPARATOR.join(words)
        pairs[text] = Pair(text, _RULES[name](words, pools))
    return tuple(pairs.values())


def _draw_triple(name: str, pools: Pools, rng: random.Random) -> Triple:
    form = rng.random()
    if name == "adjective_v_verb_3":
        form = 0.0
    elif name == "animal_v_object_3":
        form = _ADJECTIVE_VERB_SHARE
    if form < _ADJECTIVE_VERB_SHARE:
        words = [pick(rng, pools["adjective"]), *draw(rng, pools["verb"], 2)]
    elif form < _ADJECTIVE_VERB_SHARE + _ANIMAL_OBJECT_SHARE:
        words = [pick(rng, pools["animal"]), *draw(rng, pools["object"], 2)]
    else:
        words = draw(rng, [word for pool in pools.values() for word in pool], 3)
    a, b, c = draw(rng, words, 3)
    return a, b, c
