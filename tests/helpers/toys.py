"""Models small enough to work out: one that knows the answers, and one that guesses digits.

The first: two heads, one layer. Words lie in the first 34 dimensions of the residual stream, what
is read off lies in the others. Queries and keys are 0, so both heads look everywhere alike; BOS is
the zero vector and writes nothing. Head 0 writes the word three places on with gain 2, head 1 the
word five places on with gain 1/2. So the answer "three places on" is right with head 0 alone and
with both heads, wrong with head 1 alone, and without a head all logits are equal, which answers
nothing.

The second looks at nothing but its last token: after a colon it writes a space, after a space a 3.
Its tokenizer makes a token of every character, as others do of a space before a digit.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, pre_tokenizers

from ra_lens.tasks import Pair, Task
from saved_models import save, silence, word_tokenizer
from tiny_models import D_VOCAB, load, tokenizer

RIGHT, WRONG = 3, 5
FIRST, LAST = 3, D_VOCAB - 1


def follow(word: int, places: int) -> int:
    """The word some places on, among ordinary words."""
    return FIRST + (word - FIRST + places) % (LAST - FIRST + 1)


def knowing_task(name: str = "three-on") -> Task:
    """Asks for the word three places on."""
    pairs = [Pair(f"w{i}", f"w{follow(i, RIGHT)}") for i in range(FIRST, LAST + 1)]
    return Task(name, "icl", tuple(pairs), "", "", separator=" ")


def write_toy(where: Path) -> Path:
    """Save the toy as a Hugging Face folder."""
    n = D_VOCAB
    config = transformers.GPT2Config(
        vocab_size=n,
        n_layer=1,
        n_head=2,
        n_embd=2 * n,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    silence(model)
    with torch.no_grad():
        block = model.transformer.h[0].attn
        for word in range(FIRST, n):
            model.transformer.wte.weight[word, word] = 1.0
            model.lm_head.weight[word, n + word] = 1.0
            for head, (places, gain) in enumerate(((RIGHT, 2.0), (WRONG, 0.5))):
                block.c_attn.weight[word, 2 * 2 * n + head * n + word] = 1.0  # values
                block.c_proj.weight[head * n + word, n + follow(word, places)] = gain
    return save(model, tokenizer("gpt2"), where)


GUESS = "3"
CHARACTERS = ["<|endoftext|>", " ", ":", "\n", "<pad>", "-", *"0123456789"]


def digits_task(name: str = "digits") -> Task:
    """Asks for the digit that comes after: `4:` is answered by ` 5`."""
    pairs = [Pair(f"{i}{j}", str((i + j) % 10)) for i in range(5) for j in range(10)]
    return Task(name, "icl", tuple(pairs), "", ":", separator="\n")


def write_digits(where: Path) -> Path:
    """Save the toy that guesses as a Hugging Face folder."""
    n = len(CHARACTERS)
    config = transformers.GPT2Config(
        vocab_size=n,
        n_layer=1,
        n_head=2,
        n_embd=n,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.GPT2LMHeadModel(config)
    silence(model)
    follows = {":": " ", " ": GUESS}
    with torch.no_grad():
        # Heads that write next to nothing, so that what they do has a gradient.
        generator = torch.Generator().manual_seed(0)
        for name in ("c_attn", "c_proj"):
            weight = getattr(model.transformer.h[0].attn, name).weight
            weight.copy_(1e-2 * torch.randn(weight.shape, generator=generator))
        for i, character in enumerate(CHARACTERS):
            model.transformer.wte.weight[i, i] = 1.0
            after = CHARACTERS.index(follows.get(character, "-"))
            model.lm_head.weight[after, i] = 1.0
    end, each = CHARACTERS[0], pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    special = {"bos_token": end, "eos_token": end, "pad_token": end, "unk_token": "<pad>"}
    return save(model, word_tokenizer(CHARACTERS, each, **special), where)


def load_toy(where: Path, kind: object) -> object:
    """Load it with one TransformerLens class."""
    return load(write_toy(where), kind)
