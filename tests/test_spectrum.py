"""Solving with many penalties from one reduction, against NumPy's solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefs.probes.spectrum import _Diagonal, spectrum

# On machines with a GPU alone `spectrum` gives the second.
WAYS = (spectrum, _Diagonal)


def gram(d: int, rank: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rank, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x.T @ x).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize(("d", "rank"), [(1, 1), (1, 0), (2, 2), (2, 1), (3, 3), (3, 0), (40, 60), (40, 7), (130, 130)])
@pytest.mark.parametrize("targets", [1, 5])
def test_solves_as_numpy(way, dtype, rtol, d, rank, targets):
    matrix = gram(d, rank, dtype)
    right = torch.randn(d, targets, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = matrix.clone(), right.clone()
    reduced = way(matrix)
    turned = reduced.into(right)
    assert turned.dtype == dtype
    # A rotation: it keeps lengths, and `back` undoes it.
    torch.testing.assert_close(turned.norm(dim=0), right.norm(dim=0), rtol=rtol, atol=0)
    torch.testing.assert_close(reduced.back(turned), right, rtol=rtol, atol=rtol)
    for penalty in (0.1, 1.0, 300.0):
        solution, trace = reduced.solve(penalty, turned)
        inverse = np.linalg.inv(given[0].double().numpy() + penalty * np.eye(d))
        expected = inverse @ right.double().numpy()
        np.testing.assert_allclose(reduced.back(solution), expected, rtol=0, atol=rtol * np.abs(expected).max())
        assert trace == pytest.approx(np.trace(inverse), rel=10 * rtol)
    assert torch.equal(matrix, given[0])
    assert torch.equal(right, given[1])


@pytest.mark.parametrize("way", WAYS)
def test_a_wide_range_of_eigenvalues(way):
    """Massive dimensions: eigenvalues from 1e-4 to 1e8, penalties down to 1e-6."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    matrix = torch.tensor((q * np.logspace(-4, 8, 30)) @ q.T)
    matrix = (matrix + matrix.T) / 2
    reduced = way(matrix)
    for penalty in (1e-6, 1e-2, 1e4):
        _, trace = reduced.solve(penalty, reduced.into(torch.ones(30, 1, dtype=torch.float64)))
        assert trace == pytest.approx((1 / (np.logspace(-4, 8, 30) + penalty)).sum(), rel=1e-2)


def test_a_penalty_lost_in_rounding_is_told():
    matrix = gram(30, 5, torch.float64) * 1e12
    reduced = spectrum(matrix)
    with pytest.raises(ValueError, match="too small beside the rounding of the matrix"):
        reduced.solve(1e-16, torch.ones(30, 1, dtype=torch.float64))
