"""A bank of linear probes, for all targets, layers and folds at once, trained as ridge regressions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import lightning
import torch

from prefs.probes.data import Moments, ProbeBatch


class LinearProbes(lightning.LightningModule):
    """Linear probes of targets T, layers L and fits F (k folds and one on all tasks), trained together.

    Each probe minimises, over its own training tasks, mean squared error + penalty * ||w||^2, with features
    standardised and target centred by those tasks' moments: ``sklearn.linear_model.Ridge(alpha=penalty * n_train)`` on
    the output of ``StandardScaler``. The probes share nothing; held-out tasks enter no probe's objective.

    ``weight`` [T, L, F, d] is what is trained, in standardised units; `raw` gives weights and biases for the vectors as
    they were captured. The intercept needs no training: of centred data it is 0, so `raw` has it from the moments.

    Parameters
    ----------
    moments
        Of each fit's training tasks.
    penalty
        Of the squared norm, 0 or more. At 0 with more dimensions than tasks, training from 0 reaches the solution of
        least norm.
    tolerance
        A probe is trained when its gradient's norm is at most this share of what it was at 0.
    iterations
        Conjugate-gradient iterations an epoch.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    target_mean: torch.Tensor

    def __init__(self, moments: Moments, penalty: float, *, tolerance: float = 1e-7, iterations: int = 20) -> None:
        super().__init__()
        if not 0 <= penalty < float("inf"):
            raise ValueError(f"penalty={penalty}: give 0 or more")
        self.automatic_optimization = False  # conjugate gradients ask for the gradient several times a step
        self.penalty = penalty
        self.tolerance = tolerance
        self.iterations = iterations
        self.weight = torch.nn.Parameter(torch.zeros_like(moments.mean))
        self.register_buffer("mean", moments.mean)
        self.register_buffer("scale", moments.scale)
        self.register_buffer("target_mean", moments.target_mean)
        self.register_buffer("converged", torch.zeros(moments.mean.shape[:-1], dtype=torch.bool))

    def raw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [T, L, F, d] and bias [T, L, F] for features as captured: rating = weight . feature + bias."""
        weight = self.weight / self.scale
        return weight, self.target_mean[:, None, :] - (weight * self.mean).sum(-1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Predicted ratings [T, L, F, n] from features [n, L, d] as captured, float64."""
        weight, bias = self.raw()
        return torch.einsum("nld,tlfd->tlfn", features, weight) + bias[..., None]

    def predict(self, features: torch.Tensor, fit: int) -> torch.Tensor:
        """Ratings [T, L, n] that one fit predicts from features [n, L, d] as captured, float64."""
        weight, bias = self.raw()
        return torch.einsum("nld,tld->tln", features, weight[:, :, fit]) + bias[:, :, fit, None]

    def objective(self, batch: ProbeBatch) -> torch.Tensor:
        """What each probe minimises, [T, L, F]."""
        count = batch.train.sum(-1).clamp(min=1)
        # A fit without a training task has nothing to learn, and a NaN for a bias: keep it out of the gradients.
        error = self(batch.features) - batch.targets[:, None, None]
        error = torch.where(batch.train[:, None] > 0, error, 0.0)
        return error.square().sum(-1) / count[:, None] + self.penalty * self.weight.square().sum(-1)

    def training_step(self, batch: ProbeBatch, batch_idx: int) -> torch.Tensor:
        """An epoch's worth of conjugate gradients; stops the training when every probe has converged."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            total = self.objective(batch).sum()
            self.manual_backward(total)
            return total

        before = optimizer.step(closure=closure)
        conjugate = optimizer.optimizer
        assert isinstance(conjugate, ConjugateGradients)
        self.converged = conjugate.converged(self.weight)
        self.log("probe/objective", before / self.converged.numel())
        self.log("probe/converged", self.converged.double().mean())
        if self.converged.all():
            self.trainer.should_stop = True
        return before

    def configure_optimizers(self) -> ConjugateGradients:
        """Conjugate gradients, made for quadratic objectives: no learning rate, and few iterations to convergence."""
        return ConjugateGradients([self.weight], iterations=self.iterations, tolerance=self.tolerance)


class ConjugateGradients(torch.optim.Optimizer):
    """Conjugate gradients for many independent quadratic problems: one for each vector along a parameter's last axis.

    Each problem has its own step size and direction and rests once it has converged, so none depends on another.
    Formulas: Shewchuk (1994), "An introduction to the conjugate gradient method without the agonizing pain", B2; the
    product of the Hessian and a direction p is the difference of the gradients at w + p and w, exact for a quadratic.

    Parameters
    ----------
    params
        [..., d]; `step` wants a closure that clears, computes and leaves the gradient of the sum of all objectives.
    iterations
        Iterations a step.
    tolerance
        A problem has converged when its gradient's norm is at most this share of its first.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], *, iterations: int, tolerance: float) -> None:
        super().__init__(params, {"iterations": iterations, "tolerance": tolerance})
        (group,) = self.param_groups
        (self._param,) = group["params"]

    def converged(self, param: torch.Tensor) -> torch.Tensor:
        """Which of a parameter's problems have converged, [...] boolean."""
        state = self.state[param]
        return state["gradient"].norm(dim=-1) <= self.defaults["tolerance"] * state["first_norm"]

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do the iterations; returns the sum of the objectives before them."""
        assert closure is not None
        evaluate = torch.enable_grad()(closure)
        w, state = self._param, self.state[self._param]

        before = evaluate()
        gradient = _gradient(w)  # afresh at each step, so that rounding errors do not pile up
        if not state:
            state["first_norm"] = gradient.norm(dim=-1)
            state["direction"] = -gradient
        direction = state["direction"]
        state["gradient"] = gradient

        for _ in range(self.defaults["iterations"]):
            resting = self.converged(w)[..., None]
            if resting.all():
                break
            here = w.clone()
            w.add_(direction)
            evaluate()
            bend = _gradient(w) - gradient
            curvature = (direction * bend).sum(-1, keepdim=True)
            moving = ~resting & (curvature > 0)
            length = torch.where(moving, -(gradient * direction).sum(-1, keepdim=True) / curvature, 0.0)
            w.copy_(here + length * direction)
            after = gradient + length * bend
            turn = after.square().sum(-1, keepdim=True) / gradient.square().sum(-1, keepdim=True)
            direction = torch.where(moving, turn * direction - after, direction)
            gradient = after
            state["direction"], state["gradient"] = direction, gradient
        return before


def _gradient(param: torch.nn.Parameter) -> torch.Tensor:
    assert param.grad is not None
    return param.grad.clone()
