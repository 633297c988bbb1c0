"""One reduction of a matrix, and its solutions for any penalty."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefs.probes.spectrum import _Diagonal, _Tridiagonal, spectrum


@pytest.mark.parametrize("kind", [_Tridiagonal, _Diagonal])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("d", [2, 3, 40])
def test_solutions_and_traces_are_those_of_the_whole_matrix(kind, dtype, close, d):
    rng = np.random.default_rng(d)
    root = rng.normal(size=(max(d // 2, 1), d))  # singular, but for the penalty
    a, b = root.T @ root, rng.normal(size=(d, 3))
    reduced = kind(torch.tensor(a, dtype=dtype))
    right = torch.tensor(b, dtype=dtype)
    np.testing.assert_allclose(reduced.back(reduced.into(right)), b, atol=close)
    for penalty in (1e-1, 1.0, 1e4):
        solution, trace = reduced.solve(penalty, reduced.into(right))
        inverse = np.linalg.inv(a + penalty * np.eye(d))
        np.testing.assert_allclose(reduced.back(solution), inverse @ b, atol=close / penalty)
        assert trace == pytest.approx(np.trace(inverse), rel=close)


def test_the_processor_gets_the_quick_reduction():
    assert isinstance(spectrum(torch.eye(3)), _Tridiagonal)
    single = spectrum(torch.full((1, 1), 3.0))  # LAPACK's has no solution for one number
    assert single.solve(1.0, torch.ones(1, 1)) == (torch.full((1, 1), 0.25), 0.25)


def test_a_penalty_below_rounding_is_refused_and_not_solved_wrongly():
    with pytest.raises(ValueError, match="too small"):
        _Tridiagonal(-torch.eye(4)).solve(1e-3, torch.ones(4, 1))
