"""Muon: steps whose matrices have nearly equal singular values, and AdamW for what is no matrix inside a stage.

A gradient of a matrix is dominated by few directions; its polar factor U Vᵀ moves all of them alike (Jordan et al.
2024, kellerjordan.github.io/posts/muon). With g the gradient, W (m, n) the weights, λ the decay and η the rate:

    M ← M + (1-μ)(g - M);  O = polar(g + μ(M - g));  W ← (1-ηλ)·W - 0.2·η·sqrt(max(m, n))·O

The factor makes the root mean square of a step 0.2 η, as AdamW's is, so one rate and one decay serve both kinds of
parameters (arXiv 2502.16982 §2.2), and so does one first momentum. Matrices of blocks and boundaries take Muon.
Embedding, vocabulary head and tables are looked up by rows, of which a step touches few; norms are vectors: they take
AdamW, whose step each row's own gradients scale.

`polar` takes 5·(4·m²·n + 2·m³) FLOPs for m ≤ n, which is 5·(4·m + 2·m²/n) / 6·T of what a matrix costs in a step of T
tokens: 7 % of the blocks' of the 100b preset with 64 microbatches of 8,192 tokens. So they have to be as cheap as its
other products: `polar` works in its input's element type, which is that of the weights. A stage in bf16 gets what
tensor cores are made for, one in fp32 gets fp32, which an A100 without TF32 does 16 times slower.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a·s + b·s³ + c·s⁵, chosen for its slope at 0 (Jordan et al. 2024)."""
ITERATIONS = 5
SMALLEST = 1e-7
"""A matrix of a smaller norm is not scaled up to 1."""
MATCH = 0.2
"""Root mean square of AdamW's usual step, in rates (arXiv 2502.16982 §2.2)."""


def polar(matrix: Tensor) -> Tensor:
    """Nearly the polar factor U Vᵀ of a matrix U S Vᵀ (m, n), by Newton-Schulz iterations in its own element type:
    singular values between 0.68 and 1.21, where they were 0.002 of the matrix' norm or more."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp_min(SMALLEST)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def polar_flops(shape: Sequence[int]) -> int:
    """Of `polar` of a matrix of this shape."""
    m, n = sorted(shape)
    return ITERATIONS * (4 * m * m * n + 2 * m**3)


def step_scale(shape: Sequence[int]) -> float:
    """By what the polar factor of a matrix of this shape (m, n) is multiplied, besides the rate."""
    return MATCH * math.sqrt(max(shape))


class Muon(torch.optim.Optimizer):
    """Groups with `matrices` true take Muon, at `share` of the rate, the others AdamW (arXiv 1711.05101), with torch's
    own arithmetic.

    State by parameter: "exp_avg", the first moment, and for AdamW "exp_avg_sq" and "step", named and shaped as torch's.
    """

    def __init__(self, groups: Iterable[dict[str, object]], lr: float, betas: tuple[float, float], eps: float) -> None:
        """`betas[0]` is μ too."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "matrices": False, "share": 1.0})
        self._betas = betas
        self._eps = eps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there; a parameter without one stays as it is. Raises `ValueError` for a
        closure."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients before the step")
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            moving = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if not group["matrices"]:
                self._adamw(moving, lr, decay)
                continue
            for p, gradient in moving:
                self._muon(p, gradient, lr * group["share"], decay)

    def _muon(self, p: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        state, momentum = self.state[p], self._betas[0]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(state["exp_avg"], momentum)
        p.mul_(1 - lr * decay)
        p.add_(polar(ahead), alpha=-lr * step_scale(p.shape))

    def _adamw(self, moving: Sequence[tuple[Tensor, Tensor]], lr: float, decay: float) -> None:
        for p, _ in moving:
            if not self.state[p]:
                self.state[p] |= {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p, _ in moving]
        adamw(
            [p for p, _ in moving],
            [gradient for _, gradient in moving],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=False,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=lr,
            weight_decay=decay,
            eps=self._eps,
            maximize=False,
        )
