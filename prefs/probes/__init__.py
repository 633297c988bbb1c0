"""From a residual-stream vector to the rating: probes trained with Lightning, cross-validated over tasks.

`assign_folds` cuts the tasks into folds, `fit_linear` trains, `evaluate` scores the held-out predictions, and
`save_probe` keeps the result. Importing this package imports Lightning, which takes seconds: do so where a probe is
wanted.
"""

from __future__ import annotations

from prefs.probes.card import SavedProbe, load_probe, save_probe
from prefs.probes.data import ProbeData
from prefs.probes.evaluate import OriginBaseline, ProbeScore, Scores, evaluate, origin_mean_baseline, score
from prefs.probes.fit import FittedProbes, fit_linear
from prefs.probes.folds import assign_folds
from prefs.probes.linear import LinearProbes

__all__ = [
    "FittedProbes",
    "LinearProbes",
    "OriginBaseline",
    "ProbeData",
    "ProbeScore",
    "SavedProbe",
    "Scores",
    "assign_folds",
    "evaluate",
    "fit_linear",
    "load_probe",
    "origin_mean_baseline",
    "save_probe",
    "score",
]
