"""What one step of gradient descent on attention weights does: to pairs, outputs, loss, answers.

A step of size η moves each weight against its gradient, W' = W − η ∂L/∂W, with L the mean of the
losses of a cache's examples. The gradient of a matrix is a sum over tokens s of what it read times
the gradient δ at what it gave, so that what it gives moves along the gradients of all tokens, each
as far as the token now read resembles the one that was learnt from (the paper's shift of the
output, its equations 10 and 11):

    ∂L/∂W = Σ_s x_s ⊗ δ_s        x_t W' − x_t W = −η Σ_s (x_t·x_s) δ_s

That sum is linear in x_t, so the step can be taken by adding it to what the matrix gives, in a
forward hook (`gradient_step`), for any prompt and exactly; no weight is changed. What comes after,
products q·k, a softmax and later layers, is not linear. To first order,

    Δ(q·k) = Δq·k + q·Δk         of a pair, whose sign R foretells: R < 0, drawn together
    ΔS = c Δ(q·k)    ΔA = A ⊙ (ΔS − rowsum(A ⊙ ΔS))    Δz = ΔA v + A Δv
    ΔL = −η Σ ‖∂L/∂W‖²

`pulls`, `output_shift` and `step_effect` really take the step and set what happens beside this;
`largest_linear_step` finds how far it holds.

A key/value head that several query heads share has one W_K and one W_V; it is stepped if any of
them is chosen, by the gradient that all of them together give it.
"""

from ra_lens.steps.again import RunOptions
from ra_lens.steps.gradient import gradient_norm, gradient_step
from ra_lens.steps.loss import LinearStep, StepEffect, largest_linear_step, step_effect
from ra_lens.steps.output import OutputShift, output_shift
from ra_lens.steps.pairs import Pull, Pulls, pulls

__all__ = [
    "LinearStep",
    "OutputShift",
    "Pull",
    "Pulls",
    "RunOptions",
    "StepEffect",
    "gradient_norm",
    "gradient_step",
    "largest_linear_step",
    "output_shift",
    "pulls",
    "step_effect",
]
