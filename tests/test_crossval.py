"""The score that is reported is of tasks that chose nothing: not the penalty, not the layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from simulated_vectors import probe_config, residuals, signal_and_noise, tensors

from prefs.config import ProbeConfig, ProbeControlsConfig
from prefs.probes.crossval import cross_validate, held_out_origins, less_origin_means
from prefs.probes.outcome import Nothing
from prefs.probes.targets import Target
from prefs.statistics.estimates import Estimate

ORIGINS = ["A", "B", "C"] * 100


def config(kind: str = "ridge", permutations: int = 0, **changes: object) -> ProbeConfig:
    controls = ProbeControlsConfig(permutations=permutations)
    return probe_config(kind, **{"penalties": [1e-2, 1.0, 100.0], "controls": controls, **changes})


def target(values: np.ndarray, key: str = "exact", binary: bool = False) -> Target:
    return Target(key, key, values, Estimate(1.0, None, None, len(values)), binary)


def validated(
    x: torch.Tensor, *targets: Target, folds: int = 4, bootstrap: int = 0, settings: ProbeConfig | None = None
):
    numbers = np.arange(len(x)) % folds
    return cross_validate(tensors(x), targets, numbers, ORIGINS[: len(x)], settings or config(), bootstrap=bootstrap)


def test_a_signal_is_found_where_it_is_and_beats_every_shuffle():
    x = residuals(120, 4, 10, dtype=torch.float32)
    y = signal_and_noise(x, 2, 0.5)
    (result,) = validated(x, target(y), bootstrap=50, settings=config(permutations=19))
    assert result.chosen_sites.tolist() == [2] * 4
    assert result.final.site.layer == 2
    assert result.chosen.r2.value == pytest.approx(0.75, abs=0.1)
    assert result.chosen.r2.low < result.chosen.r2.value < result.chosen.r2.high
    assert result.p == result.site_p(2) == 1 / 20
    assert result.site_p(0) > 1 / 20
    low, high = result.null_band()
    assert (low < high).all()
    assert result.by_site[2].r2.value > high[2]
    assert result.final_directions.shape == (4, 10)
    for fold, probe in enumerate(result.by_fold):
        rows = result.folds == fold
        np.testing.assert_allclose(probe.predict(x[rows, 2]), result.predictions[rows], atol=1e-3)


def test_a_fold_has_no_say_in_its_own_predictions():
    x = residuals(80, 3, 6, dtype=torch.float32)
    y = signal_and_noise(x, 1, 1.0)
    mine = np.arange(80) % 4 == 2
    others = np.where(mine, 50 * signal_and_noise(x, 0, 0.0), y)  # would choose another site
    (before,), (after,) = validated(x, target(y)), validated(x, target(others))
    np.testing.assert_allclose(after.predictions[mine], before.predictions[mine], atol=1e-5)
    assert after.chosen_sites[2] == before.chosen_sites[2]


def test_p_values_of_noise_are_uniform():
    rng = np.random.default_rng(0)
    values = []
    for seed in range(40):
        x = residuals(40, 3, 12, seed, dtype=torch.float32)
        (result,) = validated(x, target(rng.normal(size=40)), settings=config(permutations=19))
        values.append(result.p)
    assert kstest(values, "uniform").pvalue > 0.01


def test_what_is_between_origins_only_is_gone_within_them():
    x = residuals(150, 1, 4, dtype=torch.float32)
    origin = np.arange(150) % 3
    x[:, 0, 3] = torch.tensor(origin).float() + 0.1 * torch.randn(150, generator=torch.Generator().manual_seed(0))
    y = origin + 0.2 * np.random.default_rng(0).normal(size=150)
    (result,) = validated(x, target(y), folds=5)
    assert result.chosen.r2.value > 0.8
    assert result.within.r2.value < 0.1
    left = less_origin_means(np.array([1.0, 3.0, 10.0]), np.array(["A", "A", "B"]))
    np.testing.assert_allclose(left, [-1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full(20, 3.5), "all 20 tasks have the same value, 3.5: there is nothing to predict"),
        (np.where(np.arange(20) < 3, 1.0, np.nan), "3 tasks have it, and 4 folds"),
        (np.where(np.arange(20) % 4 == 1, np.nan, np.arange(20.0)), "no task of fold 1 has it"),
        (np.where(np.arange(20) == 5, 1.0, 0.0), "all tasks but those of fold 1 have the same value"),
        (np.full(20, np.nan), "0 tasks have it"),
    ],
)
def test_a_target_that_cannot_be_probed_says_why(values, reason):
    (result,) = validated(residuals(20, 1, 4, dtype=torch.float32), target(values))
    assert isinstance(result, Nothing)
    assert result.reason.startswith(reason)


def test_held_out_origins_are_predicted_by_the_others():
    x = residuals(90, 2, 5, dtype=torch.float32)
    y = signal_and_noise(x, 1, 0.3)
    predictions = held_out_origins(tensors(x), target(y), ORIGINS[:90], config())
    assert np.corrcoef(predictions, y)[0, 1] > 0.85
    mine = np.arange(90) % 3 == 1
    again = held_out_origins(tensors(x), target(np.where(mine, -10 * y, y)), ORIGINS[:90], config())
    np.testing.assert_allclose(again[mine], predictions[mine], atol=1e-4)
