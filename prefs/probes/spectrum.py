"""Solving (A + a I) x = b for many penalties a, from one reduction of a symmetric matrix A."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from scipy.linalg import lapack


class Spectrum(Protocol):
    """A = Q M Q' with M easy to solve with."""

    def into(self, right: torch.Tensor) -> torch.Tensor:
        """Q' right, [d, T]."""
        ...

    def back(self, solution: torch.Tensor) -> torch.Tensor:
        """Q solution, [d, T]."""
        ...

    def solve(self, penalty: float, right: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(M + penalty I)^-1 right [d, T], with the trace of the inverse.

        Raises
        ------
        ValueError
            If the penalty is lost beside the rounding of A.
        """
        ...


def spectrum(matrix: torch.Tensor) -> Spectrum:
    """Reduce a symmetric, positive semi-definite matrix [d, d], float32 or float64.

    On the CPU to tridiagonal form, which costs a sixth of an eigendecomposition; elsewhere to its eigenvalues.
    """
    # LAPACK's tridiagonal solvers want something beside the diagonal.
    return _Tridiagonal(matrix) if matrix.device.type == "cpu" and len(matrix) > 1 else _Diagonal(matrix)


class _Tridiagonal:
    """Householder reduction, LAPACK's sytrd; Golub and Van Loan (2013), "Matrix Computations", section 8.3.1."""

    def __init__(self, matrix: torch.Tensor) -> None:
        single = matrix.dtype == torch.float32
        names = ("ssytrd", "sormqr", "spttrf", "spttrs") if single else ("dsytrd", "dormqr", "dpttrf", "dpttrs")
        reduce, self._multiply, self._factor, self._back = (getattr(lapack, name) for name in names)
        d = len(matrix)
        packed, self._diagonal, self._beside, tau, info = reduce(matrix.numpy().T, lower=1, lwork=64 * max(d, 1))
        if info:
            raise ValueError(f"LAPACK's sytrd failed ({info})")
        # The reflectors lie below the first subdiagonal, as those of a QR decomposition of the rows from 1 on.
        self._reflectors, self._tau = packed[1:, :-1], tau

    def _rotate(self, right: torch.Tensor, transposed: str) -> torch.Tensor:
        moved = np.array(right.numpy(), order="F")
        if len(self._tau):
            below, _, info = self._multiply(
                "L", transposed, self._reflectors, self._tau, moved[1:], 64 * max(moved.shape[1], 1)
            )
            if info:
                raise ValueError(f"LAPACK's ormqr failed ({info})")
            moved[1:] = below
        return torch.from_numpy(np.ascontiguousarray(moved))

    def into(self, right: torch.Tensor) -> torch.Tensor:
        return self._rotate(right, "T")

    def back(self, solution: torch.Tensor) -> torch.Tensor:
        return self._rotate(solution, "N")

    def solve(self, penalty: float, right: torch.Tensor) -> tuple[torch.Tensor, float]:
        shifted = self._diagonal + np.asarray(penalty, dtype=self._diagonal.dtype)
        pivots, factors, info = self._factor(shifted, self._beside)
        solved, failed = self._back(pivots, factors, np.asfortranarray(right.numpy()))
        from_below, _, again = self._factor(shifted[::-1], self._beside[::-1])
        if info or failed or again:
            raise ValueError(f"penalty {penalty:g} is too small beside the rounding of the matrix")
        # An entry of the inverse's diagonal from the pivots of eliminating downwards and upwards: Meurant (1992), "A
        # review on the inverse of symmetric tridiagonal and block tridiagonal matrices", theorem 3.1.
        inverse = 1.0 / (pivots.astype(np.float64) + from_below[::-1] - shifted)
        return torch.from_numpy(np.ascontiguousarray(solved)), float(inverse.sum())


class _Diagonal:
    """Eigendecomposition, where the device has no tridiagonal solver."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._values, self._vectors = torch.linalg.eigh(matrix)

    def into(self, right: torch.Tensor) -> torch.Tensor:
        return self._vectors.T @ right

    def back(self, solution: torch.Tensor) -> torch.Tensor:
        return self._vectors @ solution

    def solve(self, penalty: float, right: torch.Tensor) -> tuple[torch.Tensor, float]:
        inverse = 1.0 / (self._values.clamp(min=0) + penalty)
        return right * inverse[:, None], float(inverse.sum())
