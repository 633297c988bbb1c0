"""The score that is reported is of tasks that chose nothing: not the penalty, not the layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from simulated_vectors import residuals, signal_and_noise, tensors

from prefs.probes.crossval import CrossValidated, Nothing, cross_validate, held_out_origins, less_origin_means
from prefs.probes.descent import Descent
from prefs.probes.targets import Target
from prefs.probes.train import Training
from prefs.statistics.estimates import Estimate

TRAINING = Training(penalties=(1e-2, 1.0, 100.0))
ORIGINS = ["A", "B", "C"] * 100


def target(values: np.ndarray, key: str = "exact", binary: bool = False) -> Target:
    return Target(key, key, values, Estimate(1.0, None, None, len(values)), binary)


def validated(x: torch.Tensor, values: np.ndarray, *, permutations: int = 0, bootstrap: int = 0, folds: int = 4):
    (found,) = cross_validate(
        tensors(x),
        [target(values)],
        np.arange(len(x)) % folds,
        ORIGINS[: len(x)],
        TRAINING,
        permutations=permutations,
        bootstrap=bootstrap,
    )
    return found


def test_a_signal_is_found_where_it_is_and_beats_every_shuffle():
    x = residuals(120, 4, 10, dtype=torch.float32)
    y = signal_and_noise(x, 2, 0.5)
    found = validated(x, y, permutations=19, bootstrap=50)
    assert found.chosen_sites.tolist() == [2] * 4
    assert found.final.site.layer == 2
    assert found.chosen.r2.value == pytest.approx(0.75, abs=0.1)
    assert found.chosen.r2.low < found.chosen.r2.value < found.chosen.r2.high
    assert found.p == found.site_p(2) == 1 / 20
    assert found.site_p(0) > 1 / 20
    low, high = found.null_band()
    assert (low < high).all()
    assert found.by_site[2].r2.value > high[2]
    assert found.final_directions.shape == (4, 10)
    for fold, probe in enumerate(found.by_fold):
        rows = found.folds == fold
        np.testing.assert_allclose(probe.predict(x[rows, 2]), found.predictions[rows], atol=1e-3)


def test_a_fold_has_no_say_in_its_own_predictions():
    x = residuals(80, 3, 6, dtype=torch.float32)
    y = signal_and_noise(x, 1, 1.0)
    before = validated(x, y)
    others = y.copy()
    mine = np.arange(80) % 4 == 2
    others[mine] = 50 * signal_and_noise(x, 0, 0.0)[mine]  # would choose another site
    after = validated(x, others)
    np.testing.assert_allclose(after.predictions[mine], before.predictions[mine], atol=1e-5)
    assert after.chosen_sites[2] == before.chosen_sites[2]


def test_p_values_of_noise_are_uniform():
    rng = np.random.default_rng(0)
    values = []
    for seed in range(40):
        x = residuals(40, 3, 12, seed, dtype=torch.float32)
        values.append(validated(x, rng.normal(size=40), permutations=19).p)
    assert kstest(values, "uniform").pvalue > 0.01


def test_what_is_between_origins_only_is_gone_within_them():
    x = residuals(150, 1, 4, dtype=torch.float32)
    origin = np.arange(150) % 3
    x[:, 0, 3] = torch.tensor(origin).float() + 0.1 * torch.randn(150, generator=torch.Generator().manual_seed(0))
    y = origin + 0.2 * np.random.default_rng(0).normal(size=150)
    found = validated(x, y, folds=5)
    assert found.chosen.r2.value > 0.8
    assert found.within.r2.value < 0.1
    np.testing.assert_allclose(
        less_origin_means(np.array([1.0, 3.0, 10.0]), np.array(["A", "A", "B"])), [-1.0, 1.0, 0.0]
    )


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
    found = validated(residuals(20, 1, 4, dtype=torch.float32), values)
    assert isinstance(found, Nothing)
    assert found.reason.startswith(reason)


def test_targets_of_different_tasks_are_each_cross_validated_on_their_own():
    x = residuals(80, 2, 5, dtype=torch.float32)
    y = signal_and_noise(x, 1, 0.3)
    holes = np.where(np.arange(80) % 7 == 3, np.nan, y)
    found = cross_validate(
        tensors(x),
        [target(y), target(holes, "sampled"), target(np.zeros(80), "single")],
        np.arange(80) % 4,
        ORIGINS[:80],
        TRAINING,
        permutations=0,
        bootstrap=0,
    )
    assert [type(each) for each in found] == [CrossValidated, CrossValidated, Nothing]
    assert (len(found[0].rows), len(found[1].rows)) == (80, 69)
    alone = validated(x[np.isfinite(holes)], holes[np.isfinite(holes)])
    assert found[1].chosen.r2.value == pytest.approx(0.9, abs=0.1)
    assert alone.chosen.r2.value == pytest.approx(found[1].chosen.r2.value, abs=0.1)
    assert found[0].p is None


def test_a_yes_and_no_is_scored_by_auc():
    x = residuals(90, 2, 5, dtype=torch.float32)
    y = (signal_and_noise(x, 0, 0.3) > 0).astype(float)
    training = Training(kind="logistic", penalties=(0.1,), max_epochs=60, descent=Descent(learning_rate=3e-2))
    (found,) = cross_validate(
        tensors(x),
        [target(y, "good", binary=True)],
        np.arange(90) % 3,
        ORIGINS[:90],
        training,
        permutations=5,
        bootstrap=20,
    )
    assert found.main(found.chosen) is found.chosen.auc
    assert found.chosen.auc.value > 0.85
    assert found.p == 1 / 6
    assert found.within is None


def test_held_out_origins_are_predicted_by_the_others():
    x = residuals(90, 2, 5, dtype=torch.float32)
    y = signal_and_noise(x, 1, 0.3)
    predictions = held_out_origins(tensors(x), target(y), ORIGINS[:90], TRAINING)
    assert np.corrcoef(predictions, y)[0, 1] > 0.85
    changed = y.copy()
    mine = np.arange(90) % 3 == 1
    changed[mine] = -10 * changed[mine]
    again = held_out_origins(tensors(x), target(changed), ORIGINS[:90], TRAINING)
    np.testing.assert_allclose(again[mine], predictions[mine], atol=1e-4)


def test_an_origin_of_one_task_and_one_origin_alone():
    x = residuals(30, 1, 4, dtype=torch.float32)
    y = signal_and_noise(x, 0, 0.3)
    predictions = held_out_origins(tensors(x), target(y), ["A"] * 29 + ["B"], TRAINING)
    assert predictions is None  # nothing to train on when A is held out
    predictions = held_out_origins(tensors(x), target(y), ["A"] * 15 + ["C"] * 14 + ["B"], TRAINING)
    assert np.isfinite(predictions).all()
    assert held_out_origins(tensors(x), target(y), ["A"] * 30, TRAINING) is None
