"""What a prompt's own map does to its prediction: at the best scale, and at the paper's −30.

    python examples/scale_of_one_prompt.py                                # the embedded model
    python examples/scale_of_one_prompt.py --model smollm2-135m           # a name or a folder
    python examples/scale_of_one_prompt.py --model smollm2-135m --front "<|endoftext|>"

Each prompt is run once with its target; its own Reversed Attention, times a scale, is added to its
own attention, at the pattern and at the scores. The scale with the smallest loss is chosen knowing
the target: this says how far a step along R goes, and is no way to predict. A target of several
tokens is followed as a whole.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm

from ra_lens import best_scale, load_demo_model, load_model, load_task, run_with_ra
from ra_lens.model import as_lens
from ra_lens.patching import Where
from ra_lens.scales import BestScale

PAPER = -30.0
PLACES: tuple[Where, ...] = ("pattern", "scores")

NATURAL = (
    ("I like Italy and France. I visited the city of", " Paris"),
    ("Cherry tomato is a type of", " tomato"),
    ("My sister went to the bakery and bought a loaf of", " bread"),
    ("The opposite of hot is", " cold"),
    ("It was raining, so she opened her", " umbrella"),
    ("Anna gave the book to Peter, and Peter thanked", " Anna"),
    ("When Mary and John went to the store, John gave a drink to", " Mary"),
    ("The keys to the cabinet", " are"),
    ("The teacher that the students like", " is"),
    ("Water freezes at zero degrees", " Celsius"),
    ("The first month of the year is", " January"),
    ("Monday, Tuesday, Wednesday,", " Thursday"),
    ("One, two, three, four,", " five"),
    ("The sun rises in the", " east"),
    ("He was born in Germany, so he speaks fluent", " German"),
    ("Bees make", " honey"),
    ("The Eiffel Tower is in the city of", " Paris"),
    ("A dog barks and a cat", " meows"),
    ("The doctor listened to his heart with a", " stethoscope"),
    ("I left my phone at home, so I could not call", " you"),
    ("She poured milk into her cup of", " coffee"),
    ("The capital of Japan is", " Tokyo"),
    ("To be or not to", " be"),
    ("Once upon a", " time"),
    ("The box is too heavy for me to", " lift"),
    ("They painted the walls white and the door", " red"),
    ("In winter it is cold, in summer it is", " hot"),
    ("Ten minus three equals", " seven"),
)
"""Sentences and what may follow, some likely and some not; written before anything was measured."""

TASKS = (
    "antonym", "capitalize", "choose_middle_of_3", "country-capital", "present-past",
    "singular-plural", "natural/country-capital",
)  # fmt: skip
"""Questions of these tasks, the four first ones that `sample` draws, without an example."""


@dataclass(frozen=True)
class Found:
    """The scales of one prompt, by place."""

    prompt: str
    target: str
    at: dict[str, BestScale]


def main(
    model: Annotated[str, typer.Option(help="demo, a name, or a local folder.")] = "demo",
    front: Annotated[
        str | None,
        typer.Option(help="A token in front of every prompt. Default: what the model prepends."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many prompts at most.")] = None,
    verbose: Annotated[bool, typer.Option(help="Also print a line for each prompt.")] = False,
) -> None:
    loaded = load_demo_model() if model == "demo" else load_model(model)
    rows = [measure(loaded, *one, front) for one in tqdm(known(loaded, prompts())[:limit])]
    if verbose:
        for row in rows:
            print(f"{row.prompt!r} {row.target!r}")
            for place, found in row.at.items():
                ends = [found.probability_at(scale) for scale in (0.0, found.scale, PAPER)]
                shown = " ".join(f"{p:.2g}" for p in ends)
                print(f"    {place:8} best {found.scale:g}; p unpatched, best, −30: {shown}")
    print(table(rows))


def prompts() -> list[tuple[str, str]]:
    asked = [p for name in TASKS for p in load_task(name).sample(4, seed=0)]
    return [*NATURAL, *((p.text, p.answer) for p in asked)]


def known(model: Any, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out what has words that the model does not know."""
    lens = as_lens(model)
    return [
        pair
        for pair in pairs
        if lens.unknown_token_id not in lens.encode("".join(pair), prepend_bos=False)
    ]


def measure(model: Any, prompt: str, target: str, front: str | None) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, ra = run_with_ra(model, prompt, target=target, prepend_bos=front, progress=False)
        found = {
            place: best_scale(
                model, ra, prompt, target, at=place, prepend_bos=front, progress=False
            )
            for place in PLACES
        }
    return Found(prompt, target, found)


def table(rows: list[Found]) -> str:
    """One column per place: medians with quartiles, and counts."""
    lines = {
        "prompts": lambda each: str(len(each)),
        "best scale": lambda each: spread([found.scale for found in each]),
        "p(target) before": lambda each: spread([p(found, 0.0) for found in each]),
        "p(target) at the best scale": lambda each: spread(
            [p(found, found.scale) for found in each]
        ),
        "p(target) at −30": lambda each: spread([p(found, PAPER) for found in each]),
        "the best scale raises p(target) in": lambda each: count(
            [p(found, found.scale) > p(found, 0.0) for found in each]
        ),
        "log p gained at the best scale": lambda each: spread(
            [gained(found, found.scale) for found in each]
        ),
        "−30 raises p(target) in": lambda each: count(
            [p(found, PAPER) > p(found, 0.0) for found in each]
        ),
        "−30 lowers p(target) in": lambda each: count(
            [p(found, PAPER) < p(found, 0.0) for found in each]
        ),
        "log p gained at −30": lambda each: spread([gained(found, PAPER) for found in each]),
    }
    text = ["| | " + " | ".join(PLACES) + " |", "|---" * (len(PLACES) + 1) + "|"]
    for name, of in lines.items():
        cells = [of([row.at[place] for row in rows]) for place in PLACES]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def p(found: BestScale, scale: float) -> float:
    return found.probability_at(scale)


def gained(found: BestScale, scale: float) -> float:
    """Nats of log-probability of the whole target."""
    place, zero = found.scales.index(scale), found.scales.index(0.0)
    chances = found.probability[0].clamp(min=1e-300).log()
    return float(chances[place] - chances[zero])


def count(which: list[bool]) -> str:
    return f"{sum(which)} of {len(which)}"


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    marks = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    )
    middle, low, high = (f"{float(f'{v:.2g}'):g}".replace("-", "−") for v in marks.tolist())
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    typer.run(main)
