"""One trained probe: from a residual-stream vector, as captured, to a rating."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import gelu

from prefs.errors import UserError


class Site(NamedTuple):
    """Where a probe reads: the residual stream after block ``layer`` (0-based), at a named token position."""

    layer: int
    position: str

    def __str__(self) -> str:
        return f"{self.position}, layer {self.layer}"


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe of one site for one target.

    Attributes
    ----------
    kind
        The name of its form, one of `FORMS`.
    site
        Where it reads.
    target
        What it predicts: ``exact``, ``mean of 4 seeds``, ``refused`` ...
    mean, scale
        [d], float64: what vectors are standardised with, (vector - mean) / scale; from its training tasks alone. In
        float32 a massive dimension's mean would be rounded by a good part of its SD.
    tensors
        What its form has, float32; see `FORMS`.
    """

    kind: str
    site: Site
    target: str
    mean: torch.Tensor
    scale: torch.Tensor
    tensors: Mapping[str, torch.Tensor]

    @property
    def d_model(self) -> int:
        return len(self.mean)

    def predict(self, vectors: torch.Tensor) -> torch.Tensor:
        """Predictions [...], float32, of vectors [..., d] as captured: ratings, or the probability of a binary target.

        Raises
        ------
        UserError
            If the vectors have another width: they are of another model.
        """
        if vectors.shape[-1] != self.d_model:
            raise UserError(
                f"the probe reads vectors of {self.d_model} numbers and was given {vectors.shape[-1]}: it is of"
                " another model"
            )
        return FORMS[self.kind](((vectors.double() - self.mean) / self.scale).float(), self.tensors)

    def direction(self) -> torch.Tensor | None:
        """[d] float32, of norm 1, in the space of captured vectors: where predictions rise; None of an ``mlp``."""
        if "weight" not in self.tensors:
            return None
        raw = self.tensors["weight"] / self.scale
        return (raw / raw.norm().clamp(min=torch.finfo(raw.dtype).tiny)).float()


def _linear(z: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return z @ tensors["weight"] + tensors["bias"]


def _logistic(z: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return _linear(z, tensors).sigmoid()


def _ordinal(z: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return expected_value(z @ tensors["weight"], tensors["thresholds"], tensors["values"])


def _mlp(z: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    hidden = gelu(z @ tensors["hidden_weight"].T + tensors["hidden_bias"])
    return hidden @ tensors["out_weight"] + tensors["bias"]


def option_probabilities(score: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Cumulative-logit probabilities of V ordered options.

    McCullagh (1980), "Regression models for ordinal data": P(rating <= v) = sigmoid(threshold[v] - score).

    Parameters
    ----------
    score
        [...].
    thresholds
        [..., V - 1], rising; broadcast against the score's dimensions.

    Returns
    -------
    torch.Tensor
        [..., V].
    """
    below = (thresholds - score[..., None]).sigmoid()
    edge = torch.ones_like(below[..., :1])
    return torch.diff(torch.cat([torch.zeros_like(edge), below, edge], dim=-1), dim=-1)


def expected_value(score: torch.Tensor, thresholds: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The mean rating [...] of an ordinal probe's options, worth ``values`` [V] in rising order."""
    return option_probabilities(score, thresholds) @ values


# From standardised vectors [..., d] to predictions [...]. The tensors of each form:
#   linear    weight [d], bias []
#   logistic  the same; the prediction is a probability
#   ordinal   weight [d], thresholds [V - 1] and values [V], both rising
#   mlp       hidden_weight [h, d], hidden_bias [h], out_weight [h], bias []
FORMS: Mapping[str, Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]] = {
    "linear": _linear,
    "logistic": _logistic,
    "ordinal": _ordinal,
    "mlp": _mlp,
}
