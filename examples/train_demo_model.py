"""Train the small embedded model of ra_lens from nothing: four layers that learn in context.

The model is a GPT-2 of about one million parameters with one token per word. It reads sequences of
eleven solved questions of one task, drawn from the 21 built-in tasks, and learns to give every
answer: the first teaches it which answers are likely without demonstrations, the later ones to
find the task from the demonstrations. `ra_lens.tasks.builtin` says what is kept from it, and all
accuracies below are on such held-out prompts.

    python examples/train_demo_model.py --out demo_model
    python examples/train_demo_model.py --out demo_model --evaluate-only

The result is a folder in Hugging Face format with the accuracies beside the weights.

On a machine that does other work too, set ``OMP_WAIT_POLICY=PASSIVE``: threads that spin while they
wait for each other otherwise lose most of the speed. ``--bf16`` is for processors that have AMX;
the model in the package was made with it and the defaults, in 25 minutes on two busy cores.
"""

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ra_lens.tasks import (
    Task,
    held_out_prompts,
    is_held_out_adjacency,
    is_held_out_query,
    load_task,
    task_names,
)
from ra_lens.tasks.builtin import LIST_TASKS, SEPARATOR, list_pairs, word_pools

END, UNKNOWN = "<|endoftext|>", "<unk>"
N_POSITIONS = 128
PAIRS_PER_SEQUENCE = 11
TRIPLES_PER_LIST_TASK = 30_000
SHOTS = (0, 1, 2, 5, 10)

# Sequences of each format in one step. The tasks of one format share theirs by three factors:
# * a power of their number of pairs: a word is then not much likelier in one of its tasks than in
#   the others, the larger tasks coming first, and without demonstrations little says what is meant;
# * for the same reason, a weight for the two list tasks that any triple of words could belong to;
# * how badly a task still does after some demonstrations. Most tasks are told from what the answers
#   look like and are learnt soon; next_item and prev_item differ in nothing but direction and stay
#   at chance for long unless they get most of the sequences. Once learnt, they fall back.
PAIR_SEQUENCES, LIST_SEQUENCES, NATURAL_SEQUENCES = 40, 20, 8
SIZE_POWER = 1.5
TASK_WEIGHTS = {"alphabetically_first_3": 4.0, "choose_middle_of_3": 2.0}
FOCUS = 12.0
FOCUS_FROM_SHOT = 4


def build_tokenizer(tasks: list[Task]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word; a word's token carries its leading space."""
    vocabulary = {END: 0, UNKNOWN: 1, "\n": 2, "\n\n": 3, ",": 4, "Q:": 5, "A:": 6}
    for task in tasks:
        frame = "" if task.kind == "icl" else f"{task.before_subject}{task.after_subject}"
        words = [
            word for pair in task.pairs for word in (*pair.input.split(SEPARATOR), pair.output)
        ]
        for word in (*frame.split(), *words):
            vocabulary.setdefault(f" {word}", len(vocabulary))
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    # A word that starts a text or a line has no space in front; it gets one, to be the same token.
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"(?<![^\n])(?![QA]:)(?=[\p{L}\p{N}])"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n\n|\n|,|[QA]:| ?[\p{L}\p{N}]+"), behavior="isolated"
    )
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END, unk_token=UNKNOWN
    )


@dataclass(frozen=True)
class Segments:
    """The solved questions of one task as token ids, and which may follow which in training."""

    ids: np.ndarray  # [pair, position]
    answer_at: int
    forbidden: np.ndarray | None  # [demonstration, query]

    @classmethod
    def of(cls, task: Task, tokenizer: PreTrainedTokenizerFast) -> "Segments":
        """Tokenize every pair of `task` that may be trained on."""
        forbidden = None
        if task.name in LIST_TASKS:
            triples = list_pairs(task.name, word_pools(), TRIPLES_PER_LIST_TASK)
            task = replace(task, pairs=tuple(p for p in triples if not is_held_out_query(task, p)))
        else:
            forbidden = np.array(
                [[is_held_out_adjacency(task, a, b) for b in task.pairs] for a in task.pairs]
            )
        texts = [task.prompt(pair) + task.answer(pair) + "\n\n" for pair in task.pairs]
        ids = np.array(tokenizer(texts)["input_ids"])
        if (ids == tokenizer.unk_token_id).any():
            raise RuntimeError(f"A word of task {task.name!r} is not in the vocabulary.")
        return cls(ids, ids.shape[1] - 2, forbidden)

    def sequences(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` token sequences and the positions of their answers."""
        n = len(self.ids)
        chosen = np.empty((count, PAIRS_PER_SEQUENCE), dtype=np.int64)
        for shot in range(PAIRS_PER_SEQUENCE):
            todo = np.arange(count)
            while len(todo):
                chosen[todo, shot] = rng.integers(n, size=len(todo))
                new = chosen[todo, shot]
                bad = (chosen[todo, :shot] == new[:, None]).any(1)
                if shot and self.forbidden is not None:
                    bad |= self.forbidden[chosen[todo, shot - 1], new]
                todo = todo[bad]
        body = self.ids[chosen].reshape(count, -1)
        width = self.ids.shape[1]
        answers = 1 + self.answer_at + width * np.arange(PAIRS_PER_SEQUENCE)
        return np.pad(body, ((0, 0), (1, 0))), np.tile(answers, (count, 1))


@dataclass(frozen=True)
class Batch:
    """Sequences of one format."""

    ids: torch.Tensor  # [sequence, position]
    answers: torch.Tensor  # [sequence, shot], positions
    names: list[str]  # the task of each sequence


class Mixture:
    """Draws the sequences of every step, more of the tasks that still do badly."""

    def __init__(self, tasks: list[Task], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Tokenize all tasks."""
        self.rng = np.random.default_rng(seed)
        self.segments = {task.name: Segments.of(task, tokenizer) for task in tasks}
        self.late_loss = dict.fromkeys(self.segments, 1.0)
        self.groups = [
            (PAIR_SEQUENCES, [t for t in tasks if t.kind == "icl" and t.name not in LIST_TASKS]),
            (LIST_SEQUENCES, [t for t in tasks if t.name in LIST_TASKS]),
            (NATURAL_SEQUENCES, [t for t in tasks if t.kind == "natural"]),
        ]

    def weight(self, task: Task) -> float:
        """Return how many sequences `task` gets, relative to the others of its format."""
        fixed = len(task.pairs) ** SIZE_POWER * TASK_WEIGHTS.get(task.name, 1.0)
        return fixed * (1 + FOCUS * min(self.late_loss[task.name], 1.0))

    def draw(self) -> list[Batch]:
        """Return the batches of one step, one per format."""
        step: list[Batch] = []
        for size, members in self.groups:
            weights = np.array([self.weight(task) for task in members])
            counts = self.rng.multinomial(size, weights / weights.sum())
            drawn = [(t.name, int(n)) for t, n in zip(members, counts, strict=True) if n]
            parts = [self.segments[name].sequences(count, self.rng) for name, count in drawn]
            width = max(ids.shape[1] for ids, _ in parts)
            # Padding stands to the right, where no answer can attend to it.
            ids = [np.pad(i, ((0, 0), (0, width - i.shape[1]))) for i, _ in parts]
            answers = np.concatenate([a for _, a in parts])
            names = [name for name, count in drawn for _ in range(count)]
            step.append(
                Batch(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(answers), names)
            )
        return step

    def learn(self, batch: Batch, losses: torch.Tensor) -> None:
        """Take note of the `losses`, [sequence, shot], of a batch: running means per task."""
        late = losses.detach()[:, FOCUS_FROM_SHOT:].mean(1).tolist()
        for name, loss in zip(batch.names, late, strict=True):
            self.late_loss[name] += 0.02 * (loss - self.late_loss[name])


def answer_losses(model: GPT2LMHeadModel, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy of each answer; only their positions are unembedded."""
    hidden = model.transformer(batch.ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(batch.ids))[:, None]
    logits = model.lm_head(hidden[rows, batch.answers - 1]).float()
    wanted = batch.ids[rows, batch.answers]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of `step`: a linear warm-up, then half a cosine down to almost nothing."""
    warm_up = min(200, steps // 5)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(args: argparse.Namespace, tasks: list[Task], tokenizer: PreTrainedTokenizerFast):
    """Return a trained model."""
    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=N_POSITIONS, n_embd=128, n_layer=4, n_head=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"  # faster than the fused one for so short sequences
    model = GPT2LMHeadModel(config)
    if args.start_from:
        model.load_state_dict(GPT2LMHeadModel.from_pretrained(args.start_from).state_dict())
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98),
    )  # fmt: skip
    mixture = Mixture(tasks, tokenizer, args.seed)
    total = PAIR_SEQUENCES + LIST_SEQUENCES + NATURAL_SEQUENCES
    bar = tqdm(range(args.steps), desc="training", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss_sum = 0.0
        for batch in mixture.draw():
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                losses = answer_losses(model, batch)
            mixture.learn(batch, losses)
            loss = losses.mean() * (len(batch.ids) / total)
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss_sum:.3f}")
        if args.check_every and (step + 1) % args.check_every == 0:
            table = evaluate(model, tokenizer, tasks, n=48, shots=(0, 5))
            save(args.out, model, tokenizer, {"steps": step + 1, "accuracy": table})
            tqdm.write(f"\nstep {step + 1}, loss {loss_sum:.3f}\n{as_text(table)}")
    return model


@torch.inference_mode()
def evaluate(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: list[Task],
    n: int = 200,
    shots: tuple[int, ...] = SHOTS,
) -> dict[str, dict[str, float]]:
    """Return the accuracy on `n` held-out prompts per task and number of shots."""
    model.eval()
    table: dict[str, dict[str, float]] = {}
    for task in tasks:
        table[task.name] = {}
        for k in shots:
            prompts = held_out_prompts(task, n, shots=k, seed=1)
            # All prompts of one task and number of shots have the same number of tokens.
            ids = torch.tensor(tokenizer([END + prompt.text for prompt in prompts])["input_ids"])
            wanted = torch.tensor(tokenizer([p.answer for p in prompts])["input_ids"])[:, 0]
            hidden = model.transformer(ids).last_hidden_state[:, -1]
            right = model.lm_head(hidden).argmax(-1) == wanted
            table[task.name][str(k)] = round(right.float().mean().item(), 4)
    columns = [str(k) for k in shots]
    icl = [table[task.name] for task in tasks if task.kind == "icl"]
    table["average over ICL tasks"] = {
        k: round(sum(r[k] for r in icl) / len(icl), 4) for k in columns
    }
    rows = [table[task.name] for task in tasks]
    table["average over all tasks"] = {
        k: round(sum(r[k] for r in rows) / len(rows), 4) for k in columns
    }
    model.train()
    return table


def as_text(table: dict[str, dict[str, float]]) -> str:
    """Return the accuracies as lines of text, one per task."""
    heading = "".join(f"{k + ' shots':>10}" for k in next(iter(table.values())))
    lines = [
        f"{name:26}" + "".join(f"{v:10.3f}" for v in row.values()) for name, row in table.items()
    ]
    return "\n".join([" " * 26 + heading, *lines])


def save(
    out: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, report: dict[str, Any]
) -> None:
    """Write the folder beside `out`, then put it in its place."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}.new")
    model.save_pretrained(fresh)
    (fresh / "generation_config.json").unlink(missing_ok=True)
    tokenizer.backend_tokenizer.save(str(fresh / "tokenizer.json"))
    # Written by hand: the class name that transformers 5 would write is unknown to transformers 4.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "unk_token": UNKNOWN,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": N_POSITIONS,
    }
    (fresh / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (fresh / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    for file in fresh.iterdir():
        file.chmod(0o644)  # some versions of safetensors let the owner alone read
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model of ra_lens.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (or to evaluate)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--bf16", action="store_true", help="faster on processors with AMX")
    parser.add_argument("--check-every", type=int, default=0, help="steps between checkpoints")
    parser.add_argument("--start-from", type=Path, help="folder of a model to train further")
    parser.add_argument("--evaluate-only", action="store_true", help="do not train, read --out")
    args = parser.parse_args()

    tasks = [load_task(name) for name in task_names()]
    if args.evaluate_only:
        model = GPT2LMHeadModel.from_pretrained(args.out)
        print(as_text(evaluate(model, AutoTokenizer.from_pretrained(args.out), tasks)))
        return
    tokenizer = build_tokenizer(tasks)
    wall, cpu = time.time(), time.process_time()
    model = train(args, tasks, tokenizer)
    wall, cpu = (time.time() - wall) / 60, (time.process_time() - cpu) / 60
    accuracy = evaluate(model, tokenizer, tasks)
    report = {
        "what": "accuracy on held-out prompts (ra_lens.tasks.builtin) by number of demonstrations",
        "seed": args.seed,
        "steps": args.steps,
        "wall_minutes": round(wall, 1),
        "cpu_minutes": round(cpu, 1),
        "accuracy": accuracy,
    }
    save(args.out, model, tokenizer, report)
    print(as_text(accuracy))
    print(f"{wall:.1f} minutes, {cpu:.1f} of processor time")


if __name__ == "__main__":
    main()
