"""The vectors that probes read, [tasks, sites, d_model]: in memory, or left in the store until they are wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from prefs.probes.probe import Site
from prefs.stages.records import Residuals

# What to say of such a vector, which the store of this version would not have kept.
NOT_FINITE = "holds a NaN or an infinity: capture it anew, with another capture.dtype (bfloat16 or float32)"


class NotFinite(ValueError):
    """A vector holds a NaN or an infinity; ``row`` and ``site`` say which."""

    def __init__(self, row: int, site: Site):
        super().__init__(f"the vector of row {row} at {site} holds a NaN or an infinity")
        self.row = row
        self.site = site


class Features(ABC):
    """Vectors of n tasks at S sites, read a few rows at a time.

    Attributes
    ----------
    sites
        S of them.
    order
        [n] int64: the rows in the order in which they are quickest to read.
    """

    def __init__(self, sites: Sequence[Site], d_model: int, order: np.ndarray) -> None:
        self.sites = tuple(sites)
        self.n, self.d_model = len(order), d_model
        self.order = order

    @abstractmethod
    def gather(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        """Vectors [rows, sites, d_model] as they are stored."""

    def read(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        """Vectors [rows, sites, d_model] in the type they are stored in.

        Raises
        ------
        NotFinite
            If one holds a NaN or an infinity.
        """
        vectors = self.gather(rows, sites)
        # A sum is finite where its parts are, but for an overflow, and costs no copy: look closer only where it is not.
        if not vectors.sum(dtype=torch.float64).isfinite():
            broken = (~vectors.isfinite().all(dim=2)).nonzero().tolist()
            if broken:
                row, site = broken[0]
                raise NotFinite(int(rows[row]), self.sites[sites][site])
        return vectors

    def only(self, rows: np.ndarray) -> Features:
        """These tasks, in this order."""
        return _Some(self, rows)


class Tensors(Features):
    """Features that lie in memory: [n, S, d_model], of any floating type."""

    def __init__(self, vectors: torch.Tensor, sites: Sequence[Site]) -> None:
        if vectors.ndim != 3 or not vectors.is_floating_point() or 0 in vectors.shape:
            got = f"{list(vectors.shape)} {vectors.dtype}"
            raise ValueError(f"vectors must be [tasks, sites, d_model] floating-point numbers, at least one; got {got}")
        if len(sites) != vectors.shape[1]:
            raise ValueError(f"{len(sites)} sites do not fit vectors {list(vectors.shape)}")
        super().__init__(sites, vectors.shape[2], np.arange(len(vectors)))
        self._vectors = vectors

    def gather(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        return self._vectors[:, sites][torch.as_tensor(rows)]


class Captured(Features):
    """Features in the store's shards, which are memory-mapped: what is not read takes no memory.

    Parameters
    ----------
    residuals
        Of the same list of completions, one for each position. All layers of a position are sites.
    rows
        [n] which of the completions; each must have a vector at every position.
    """

    def __init__(self, residuals: Sequence[Residuals], rows: Sequence[int]) -> None:
        self._residuals = residuals
        self._keys = [[str(position.keys[row]) for row in rows] for position in residuals]
        first, keys = residuals[0], self._keys[0]
        super().__init__(
            [Site(layer, captured.position) for captured in residuals for layer in captured.layers],
            first.vectors.gather(keys[:1], first.layers[:1]).shape[-1],
            np.array(first.vectors.in_order(keys), dtype=np.int64),
        )

    def gather(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        parts = []
        for captured, keys in zip(self._residuals, self._keys, strict=True):
            layers = [site.layer for site in self.sites[sites] if site.position == captured.position]
            if layers:
                parts.append(captured.vectors.gather([keys[row] for row in rows], layers))
        return torch.cat(parts, dim=1)


class _Some(Features):
    def __init__(self, whole: Features, rows: np.ndarray) -> None:
        numbers = np.full(whole.n, -1)
        numbers[rows] = np.arange(len(rows))
        order = numbers[whole.order]
        super().__init__(whole.sites, whole.d_model, order[order >= 0])
        self._whole, self._rows = whole, rows

    def gather(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        return self._whole.gather(self._rows[np.asarray(rows)].tolist(), sites)
