"""Scores from one forward and one backward pass: what the loss says of a head's attention and z.

L is the mean cross-entropy over the answer's tokens, A the pattern, G = ∂L/∂A, z what the head
gives to W_O (times a gate or after a norm, where the model has one in between), R~ = A ⊙ (G −
rowsum(A ⊙ G)) and R = scale · R~. Each score is that of an example, averaged over the prompts, and
costs what all of them together cost: one forward and one backward pass for each prompt; `nap` and
`nap_ig` read the corrupted twins too, z′ (`ra_lens.heads.corrupted`), at more.

    ra          ‖R‖                              where the loss would move attention
    w_norm      (Σ ‖∂L/∂W‖²)^½                   W_Q, W_K, W_V, W_O of the head
    michel      |Σ z·∂L/∂z|                      zeroing the head, foretold, without its sign
    atp         −Σ z·∂L/∂z                       the same with its sign: positive, the loss rises
    knockout    Σ |R~ / (1 − A)|                 knocking out each edge, without its sign
    grad_sam    Σ relu(−A ⊙ G)                   cutting each edge, where that raises the loss
    ag          Σ |A ⊙ G|                        cutting each edge, without its sign
    grad_norm   ‖G‖ where A > 0                  what looking elsewhere would change
    nap         Σ (z′ − z)·∂L/∂z                 the corrupted prompt's z in its place, foretold
    nap_ig      Σ (z′ − z)·mean ∂L/∂z            the same, the gradient taken on the way there

They ask two questions. Zeroing a head takes away all that it gives, so `michel` and `atp` know
nothing of where it looks; R~ sums to 0 in each row, so `ra` and `knockout` know nothing of how much
it gives. A ⊙ G = R~ + A ⊙ (z·∂L/∂z) is both, and so are `grad_sam` and `ag`.

Σ z·∂L/∂z is Σ A ⊙ G wherever z is A·v, times a gate or not, since both are linear in A. Where a
norm of z stands between, or a hook edits pattern or z, they differ, and zeroing z is what masking
(`ra_lens.patching.masking`) and `cm1` do. So z is read, not the maps. Zeroing leaves what value
biases that were folded into the output bias write (`Lens.value_biases_folded`); `michel` and `atp`
leave it out likewise. Of a layer that runs several times, maps and z are those of the last time.

Each is a slope. A saturated head (A near 0 or 1) has a small R~, and a sure answer (p near 1) has
small gradients altogether; averages are then those of the prompts that the model is unsure of. Sums
over edges and tokens grow with the prompt, so that long prompts count for more.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.heads.corrupted import CorruptedRun
from ra_lens.heads.registry import one_run_method
from ra_lens.model.sites import table
from ra_lens.vjp import FACTORS, WEIGHTS, norms_of_all_weights


@one_run_method("ra", label="RA", title="norm of Reversed Attention")
def ra_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """Frobenius norm of R: how far descent would move the head's attention (paper section 5.2).

    R carries the softmax scale, which differs between layers in few models. Like every norm it
    knows no sign: a head may be large because its attention hurts.
    """
    return ra.norms("ra")


@one_run_method(
    "w_norm",
    label="∂W",
    title="norm of the gradient of a head's weights",
    vectors=[kind for weight in WEIGHTS for kind in FACTORS[weight]],
)
def w_norm_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """(‖∂L/∂W_Q‖² + ‖∂L/∂W_K‖² + ‖∂L/∂W_V‖² + ‖∂L/∂W_O‖²)^½, by `ra_lens.vjp`.

    A key/value head that several heads share counts for each of them. It knows no sign.

    Raises:
        NotStored: this attention has no such matrices.
        UnsupportedModel: a layer that runs several times.
    """
    return norms_of_all_weights(ra)


@one_run_method(
    "michel",
    label="Michel",
    title="foretold effect of zeroing, its size",
    vectors=["z", "z_grad"],
)
def michel_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """|Σ z·∂L/∂z| over all tokens: |∂L/∂ξ| of a gate ξ = 1 on what the head gives.

    Positive, without a direction: a head that hurts ranks as high as one that helps. Not divided by
    the norm of its layer, as the source does before it compares layers. It fails where the loss is
    not linear in z between the head and nothing: several heads that do the same, each of which
    could go alone, and saturated answers.

    Source: Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?" (2019), eq. 2.
    """
    return _slope_of_gate(ra).abs()


@one_run_method(
    "atp", label="AtP", title="foretold effect of zeroing, signed", vectors=["z", "z_grad"]
)
def atp_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """−Σ z·∂L/∂z over all tokens: the first-order change of the loss when the head is zeroed.

    In nats. Positive: the loss rises without it, so the answer needs it; negative: it hurts, and
    such heads come last. Effects of different signs cancel over prompts: a head that helps one
    question and hurts the next scores 0. It foretells one head's removal from the whole model, not
    what heads do once most others are gone.

    Source: attribution patching (Nanda 2023; Syed, Rager and Conmy 2023, arXiv 2310.10348; Kramár
    et al. 2024, arXiv 2403.00745), with z = 0 in the place of another prompt's z.
    """
    return -_slope_of_gate(ra)


@one_run_method(
    "nap",
    label="NAP",
    title="foretold effect of the corrupted prompt, signed",
    vectors=["z"],
    corrupted=True,
)
def nap_scores(ra: RACache, other: CorruptedRun) -> Float[Tensor, "batch layer head"]:
    """Σ (z′ − z)·∂L/∂z over all tokens: the change of the loss when the head gives z′, foretold.

    z′ is what it gives on the prompt's corrupted twin. In nats, to first order. Positive: the loss
    rises, so the answer needs what tells the prompt from its twin; negative: it hurts. Two forward
    passes and one backward pass. It foretells `resample`, one head at a time, and as `atp` it fails
    at answers that the model is sure of, at heads that do the same, and where attention downstream
    is saturated. Twins that differ in more than the answer hangs on bring in all that differs.

    Source: attribution patching of nodes (NAP): Nanda 2023; Syed, Rager and Conmy 2023, arXiv
    2310.10348, in which the metric is a difference of logits.
    """
    return _towards(ra, other)


@one_run_method(
    "nap_ig",
    label="NAP-IG",
    title="foretold effect of the corrupted prompt, in 5 steps from it",
    vectors=["z"],
    corrupted=True,
    steps=5,
)
def nap_ig_scores(ra: RACache, other: CorruptedRun) -> Float[Tensor, "batch layer head"]:
    """Σ (z′ − z)·(1/m) Σ_k ∂L/∂z at x_k = x′ + k/m (x − x′), in m = 5 steps of the embeddings x.

    Sign and unit are those of `nap`, which it is with one step. The gradients of the steps see the
    loss where the answer is not sure yet, which `nap` does not. m + 1 forward passes and m backward
    ones. What lies between the embeddings of two tokens is no prompt, and where the loss bends more
    than m steps show it is still no effect. Another m is a method of one's own:
    `one_run_method("nap_ig_30", vectors=["z"], corrupted=True, steps=30)(nap_ig_scores)`.

    Source: Hanna, Pezzelle and Belinkov 2024, "Have Faith in Faithfulness", arXiv 2403.17806
    (EAP-IG, inputs), of nodes.

    Raises:
        UnsupportedModel: a model without the hook point `hook_embed`.
    """
    return _towards(ra, other)


@one_run_method(
    "knockout",
    label="Knockout",
    title="foretold knockouts of edges, sizes summed",
    maps=["knockout"],
)
def knockout_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """Σ |R~ / (1 − A)| over all edges: how much hangs on where the head looks.

    Without signs, because rows of R~ sum to 0: a signed sum would be what the factors 1/(1 − A)
    leave of 0, and foretells nothing, as the edges of a row cannot all be knocked out. An edge that
    hurts counts as one that helps. It says nothing of a head that gives the same wherever it looks,
    however much the answer needs that.

    Source: `ra_lens.knockouts.predict`; knocking edges out: Geva et al. 2023, arXiv 2304.14767.
    """
    return _summed(ra, lambda layer: ra["knockout", layer].abs())


@one_run_method(
    "grad_sam",
    label="Grad-SAM",
    title="foretold cuts of edges that raise the loss, summed",
    maps=["cut"],
)
def grad_sam_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """Σ relu(−A ⊙ G) over all edges: attention that lowers the loss, times how much it does.

    At least 0; edges that hurt count for nothing. Whatever all keys' values share counts for every
    edge, so a head that rests on a sink may rank high.

    Source: Barkan et al., "Grad-SAM" (CIKM 2021), which takes the mean over a map of A ⊙ relu of
    the gradient of the answer's score, here −L; the same product in Chefer, Gur and Wolf (2021).
    """
    return _summed(ra, lambda layer: ra["cut", layer].relu())


@one_run_method("ag", label="|A·G|", title="foretold cuts of edges, sizes summed", maps=["cut"])
def ag_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """Σ |A ⊙ G| over all edges: attention times its gradient.

    At least `michel`, of which it is the sum before opposite edges cancel. It knows no sign, and as
    `grad_sam` it counts what all values share for every edge.
    """
    return _summed(ra, lambda layer: ra["cut", layer].abs())


@one_run_method(
    "grad_norm",
    label="‖G‖",
    title="norm of the gradient of the pattern",
    maps=["pattern", "pattern_grad"],
)
def grad_norm_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """Frobenius norm of G over the edges that exist, those with A > 0.

    G at a key that no query may look at (above the diagonal, beyond a window) is a number all the
    same, ∂L/∂z·v, and says nothing of the head; so it is left out, unlike in `ra.norms`. It knows
    no sign, and does not ask whether the head looks there at all.
    """

    def of_layer(layer: int) -> Tensor:
        return ra["pattern_grad", layer].where(ra["pattern", layer] > 0, 0.0).square()

    return _summed(ra, of_layer).sqrt()


def _slope_of_gate(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """Σ z·∂L/∂z over tokens."""
    return _rows(ra, lambda i: (ra["z", i] * ra["z_grad", i]).sum(dim=(1, 3)))


def _towards(ra: RACache, other: CorruptedRun) -> Float[Tensor, "batch layer head"]:
    """Σ (z′ − z)·∂L/∂z over tokens."""

    def of_layer(layer: int) -> Tensor:
        z = ra["z", layer]
        return ((other.z[layer].to(z) - z) * other.z_grad[layer].to(z)).sum(dim=(1, 3))

    return _rows(ra, of_layer)


def _summed(ra: RACache, of_layer: Callable[[int], Tensor]) -> Float[Tensor, "batch layer head"]:
    """Sum over the edges of each head what `of_layer` makes of a layer's maps."""
    return _rows(ra, lambda layer: of_layer(layer).sum(dim=(-2, -1)))


def _rows(ra: RACache, of_layer: Callable[[int], Tensor]) -> Float[Tensor, "batch layer head"]:
    rows = [of_layer(layer) for layer in ra.layers]
    return table([row.to(rows[0].device) for row in rows])
