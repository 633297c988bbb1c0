"""The vectors that probes read, [tasks, sites, d_model]: in memory, or left in the store until they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from prefs.probes.probe import Site
from prefs.stages.records import Residuals


class NotFinite(ValueError):
    """A vector holds a NaN or an infinity; ``row`` and ``site`` say which."""

    def __init__(self, row: int, site: Site):
        super().__init__(f"the vector of row {row} at {site} holds a NaN or an infinity")
        self.row = row
        self.site = site


class Features(Protocol):
    """Vectors of n tasks at S sites, read a few rows at a time."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    n: int
    d_model: int
    # [n] int64: the rows in the order in which they are quickest to read.
    order: np.ndarray

    def read(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        """Vectors [rows, sites, d_model] in the type they are stored in.

        Raises
        ------
        NotFinite
            If one holds a NaN or an infinity.
        """
        ...


class Tensors:
    """Features that lie in memory: [n, S, d_model], of any floating type."""

    def __init__(self, vectors: torch.Tensor, sites: Sequence[Site]):
        if vectors.ndim != 3 or not vectors.is_floating_point() or 0 in vectors.shape:
            got = f"{list(vectors.shape)} {vectors.dtype}"
            raise ValueError(f"vectors must be [tasks, sites, d_model] floating-point numbers, at least one; got {got}")
        if len(sites) != vectors.shape[1]:
            raise ValueError(f"{len(sites)} sites do not fit vectors {list(vectors.shape)}")
        self._sites = tuple(sites)
        self.n, _, self.d_model = vectors.shape
        self.order = np.arange(self.n)
        self._vectors = vectors

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    def read(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        """As `Features.read`."""
        found = self._vectors[:, sites][torch.as_tensor(rows)]
        _check_finite(found, rows, self.sites[sites])
        return found


class Captured:
    """Features in the store's shards, which are memory-mapped: what is not read takes no memory.

    Parameters
    ----------
    residuals
        Of the same list of completions, one for each position. All layers of a position are sites.
    rows
        [n] which of the completions; each must have a vector at every position.
    """

    def __init__(self, residuals: Sequence[Residuals], rows: Sequence[int]):
        self._residuals = residuals
        self._keys = [[str(each.keys[row]) for row in rows] for each in residuals]
        self._sites = tuple(Site(layer, each.position) for each in residuals for layer in each.layers)
        self.n = len(rows)
        self.d_model = residuals[0].vectors.gather(self._keys[0][:1], residuals[0].layers[:1]).shape[-1]
        self.order = np.array(residuals[0].vectors.in_order(self._keys[0]), dtype=np.int64)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    def read(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        """As `Features.read`."""
        wanted, parts = self.sites[sites], []
        for each, keys in zip(self._residuals, self._keys, strict=True):
            layers = [site.layer for site in wanted if site.position == each.position]
            if layers:
                parts.append(each.vectors.gather([keys[row] for row in rows], layers))
        found = torch.cat(parts, dim=1)
        _check_finite(found, rows, wanted)
        return found


def _check_finite(vectors: torch.Tensor, rows: Sequence[int], sites: Sequence[Site]) -> None:
    # A sum is finite where its parts are, but for an overflow, and costs no copy: look closer only where it is not.
    if vectors.sum(dtype=torch.float64).isfinite():
        return
    finite = vectors.isfinite().all(dim=2)
    if not finite.all():
        at, site = (~finite).nonzero()[0].tolist()
        raise NotFinite(int(rows[at]), sites[site])
