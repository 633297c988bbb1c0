"""What a job's concept vectors have to do with one cell: with its ratings, and with the directions of its probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from prefs.concepts.difference import project
from prefs.concepts.extract import Concept
from prefs.probes.features import Captured
from prefs.probes.scores import score
from prefs.results.summary import columns, numeric
from prefs.stages.probe import ProbeReport
from prefs.stages.records import Residuals
from prefs.statistics.estimates import Resamples
from prefs.statistics.measured import Measured

WORDS = ("concept", "with", "position")


def rating_correlations(
    concepts: Sequence[Concept], measured: Measured, residuals: Mapping[str, Residuals], bootstrap: int, seed: int
) -> pd.DataFrame:
    """Pearson r over tasks of the projection on each concept's vector with the rating, one row a concept and site.

    The projections are of the job's own completions, and the rating is the exact mean (else the mean over seeds). A
    task that the vector is from is projected on one without its fold.
    """
    positions = list(residuals.values())
    if not positions:
        return pd.DataFrame()
    rows = np.flatnonzero(np.all([each.present() for each in positions], axis=0))
    rating = measured.task_means[rows]
    draws = Resamples.draw(len(rows), bootstrap, seed)
    found = []
    for concept in concepts if len(rows) else ():
        fits = concept.fits([measured.tasks[row] for row in rows])
        along = project(Captured(positions, rows.tolist()), concept.difference, fits)
        for site, scores in zip(concept.difference.sites, score(along, rating, draws), strict=True):
            row: dict[str, object] = {"concept": concept.config.name, **site._asdict(), "n": scores.pearson.n}
            found.append(row | columns("r", scores.pearson))
    return numeric(pd.DataFrame(found), words=WORDS) if found else pd.DataFrame()


def probe_cosines(concepts: Sequence[Concept], report: ProbeReport) -> pd.DataFrame:
    """Cosine of each concept's vector with the direction of each probe, at the sites that both have.

    ``random_sd`` is 1/√d, the standard deviation of the cosine of two random directions.
    """
    found = []
    for concept in concepts:
        sites = concept.difference.sites
        for result in report.results:
            if result.final_directions is None:
                continue
            for site, direction in zip(report.features.sites, result.final_directions.double(), strict=True):
                if site not in sites:
                    continue
                own = concept.difference.direction[-1, sites.index(site)].double()
                cosine = float((own @ direction).clamp(-1, 1)) if bool(own.any() and direction.any()) else None
                row: dict[str, object] = {"concept": concept.config.name, "with": f"probe on {result.target.name}"}
                found.append(row | {**site._asdict(), "cosine": cosine, "random_sd": len(own) ** -0.5})
    return numeric(pd.DataFrame(found), words=WORDS) if found else pd.DataFrame()
