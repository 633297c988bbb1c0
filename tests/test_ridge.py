"""Ridge probes: scikit-learn's, all penalties at once, chosen by generalised cross-validation and blind to what is
held out."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from simulated_vectors import planted, probe_config, residuals, tensors
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from prefs.errors import UserError
from prefs.probes.data import ProbeData
from prefs.probes.folds import Splits
from prefs.probes.ridge import RidgeBank
from prefs.probes.train import fit, train

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3)
# More tasks than dimensions, and fewer.
BOTH_WAYS = pytest.mark.parametrize(("n", "d"), [(60, 12), (40, 60)], ids=["primal", "dual"])


def config(penalties=PENALTIES, **changes):
    return probe_config("ridge", penalties=list(penalties), **changes)


def bank_of(vectors, targets, splits, penalties=PENALTIES) -> RidgeBank:
    data = ProbeData(tensors(vectors), slice(0, vectors.shape[1]), torch.as_tensor(targets), splits)
    bank = RidgeBank(data, config(penalties))
    fit(bank)
    return bank


def noisy(n: int, targets: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, size=(n, targets))


def by_thirds(n: int, k: int = 3) -> Splits:
    return Splits.draw(np.arange(n) % k, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d"), [(120, 24), (40, 90), (40, 40), (30, 29)])
def test_is_scikit_learns_ridge(n, d, dtype):
    """Every penalty by itself, and the one that is chosen among all."""
    vectors = residuals(n, 2, d, dtype=dtype)
    targets = np.stack([planted(vectors, 1, 0.7), noisy(n, 1)[:, 0]], axis=1)
    splits = by_thirds(n, 4)
    together = bank_of(vectors, targets, splits)
    assert together.dual == (n <= d)
    assert torch.equal(together.chosen, together.criterion.argmin(2))
    for number, penalty in enumerate(PENALTIES):
        bank = bank_of(vectors, targets, splits, [penalty])
        for fold in range(5):
            rows, chosen = splits.training(fold), together.predict_fit(vectors, fold)
            predicted = bank.predict_fit(vectors, fold)
            for layer, t in np.ndindex(2, 2):
                x, close = vectors[:, layer].double().numpy(), 1e-4 * targets[:, t].std()
                peer = make_pipeline(StandardScaler(), Ridge(alpha=penalty * rows.sum())).fit(x[rows], targets[rows, t])
                np.testing.assert_allclose(predicted[:, layer, t], peer.predict(x), rtol=0, atol=close)
                if together.chosen[fold, layer, t] == number:
                    np.testing.assert_allclose(chosen[:, layer, t], peer.predict(x), rtol=0, atol=close)


@BOTH_WAYS
def test_criterion_is_generalised_cross_validation(n, d):
    """With the hat matrix written out."""
    vectors = residuals(n, 1, d)
    targets = np.stack([planted(vectors, 0, 0.8), noisy(n, 1)[:, 0]], axis=1)
    splits = by_thirds(n)
    bank = bank_of(vectors, targets, splits)
    for fold in range(4):
        rows = splits.training(fold)
        z = StandardScaler().fit_transform(vectors[rows, 0].double().numpy())
        m = rows.sum()
        for number, penalty in enumerate(PENALTIES):
            hat = np.full((m, m), 1 / m) + z @ np.linalg.solve(z.T @ z + penalty * m * np.eye(d), z.T)
            residual = targets[rows] - hat @ targets[rows]
            expected = (residual**2).sum(0) / m / (1 - np.trace(hat) / m) ** 2
            np.testing.assert_allclose(bank.criterion[fold, 0, number], expected, rtol=1e-6)
    # A strong signal wants less of a penalty than none at all.
    assert bank.chosen[-1, 0, 0] < bank.chosen[-1, 0, 1]


@BOTH_WAYS
def test_held_out_tasks_never_touch_their_fit(n, d):
    vectors, targets = residuals(n, 2, d, dtype=torch.float32), noisy(n, 2)
    splits = by_thirds(n, 4)
    before = bank_of(vectors, targets, splits)
    held_out = splits.group == 2
    changed, others = vectors.clone(), targets.copy()
    noise = torch.randn(changed[held_out].shape, generator=torch.Generator().manual_seed(0))
    changed[held_out] = 1e6 * (1 + noise)
    others[held_out] += 1e4
    after = bank_of(changed, others, splits)
    for name in ("mean", "scale", "weight", "bias", "criterion"):
        first, second = getattr(before, name), getattr(after, name)
        # The criterion of small penalties divides what is left of rounding.
        close = 1e-9 if name == "criterion" else 1e-12
        torch.testing.assert_close(
            second[2], first[2], rtol=0, atol=close * max(float(first[2].abs().max()), 1), msg=name
        )
        for fold in (0, 1, 3, 4):
            assert (second[fold] - first[fold]).abs().max() > 1e-3 * first[fold].abs().max()
    assert torch.equal(after.chosen[2], before.chosen[2])


@BOTH_WAYS
def test_a_feature_that_is_constant_in_training_has_no_weight(n, d):
    """Of all tasks, or of those that one fit trains on: what the held-out tasks have there says nothing."""
    vectors, targets = residuals(n, 1, d, dtype=torch.float32), noisy(n, 1)
    splits = by_thirds(n)
    without = bank_of(vectors, targets, splits).predict_fit(vectors, 1)
    several = torch.cat([vectors, torch.full((n, 1, 2), 0.1)], dim=2)
    several[1::3, 0, -1] = torch.linspace(-3000, 2000, len(several[1::3]))
    bank = bank_of(several, targets, splits)
    assert bank.weight[:, 0, 0, -2].abs().max() < 1e-12
    assert bank.weight[1, 0, 0, -1].abs().max() < 1e-12
    torch.testing.assert_close(bank.predict_fit(several, 1), without, rtol=0, atol=1e-8)


def test_a_probe_by_itself_predicts_what_the_bank_does():
    """Also where the mean is a thousand times the SD, as of massive activations."""
    vectors = residuals(60, 2, 10, dtype=torch.float32)
    vectors[:, :, 3] = 30_000 + torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    y, splits = planted(vectors, 1, 0.99), by_thirds(60)
    trained = train(tensors(vectors), torch.as_tensor(y)[:, None], splits, config([1e-6]), kept=1)
    for fold in range(3):
        probe, held_out = trained.probe(fold, 1, 0, "y"), splits.group == fold
        predicted, direction = probe.predict(vectors[held_out, 1]), probe.direction()
        assert predicted.dtype == direction.dtype == torch.float32
        np.testing.assert_allclose(predicted, trained.out_of_fold[held_out, 1, 0], rtol=0, atol=1e-5)
        assert direction.norm() == pytest.approx(1, abs=1e-6)


def test_constant_target_and_tiny_data():
    vectors = residuals(6, 1, 3)
    targets = np.stack([np.full(6, 4.0), noisy(6, 1)[:, 0]], axis=1)
    bank = bank_of(vectors, targets, by_thirds(6))
    np.testing.assert_allclose(bank.predict_fit(vectors, 3)[:, 0, 0], 4.0)
    # Folds of one task; with two tasks, each fit trains on a single one and can but predict it.
    bank = bank_of(vectors[:2], targets[:2], by_thirds(2, 2))
    np.testing.assert_allclose(bank.predict_fit(vectors, 0)[:, 0, 1], targets[1, 1])
    assert bank.weight[:2].abs().max() == 0


@BOTH_WAYS
def test_a_penalty_lost_in_rounding_is_told(n, d):
    vectors = residuals(n, 1, d, dtype=torch.float32)
    vectors[:, :, d // 2 :] = vectors[:, :, : d // 2]
    with pytest.raises(UserError, match=r"probe\.penalties: 1e-30 is too small"):
        bank_of(vectors, noisy(n, 1), by_thirds(n), [1e-30])


def test_training_leaves_no_trace(tmp_path, monkeypatch, capfd, caplog, recwarn):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]

    def state():
        numpys = np.random.get_state()[1].tolist()
        threads = torch.get_num_threads(), torch.get_default_dtype()
        return torch.get_rng_state().tolist(), random.getstate(), numpys, threads, [logger.level for logger in loggers]

    before = state()
    features, y = tensors(residuals(20, 2, 8)), torch.as_tensor(noisy(20, 1))
    first, second = (train(features, y, by_thirds(20), config(), kept=1) for _ in range(2))
    assert np.array_equal(first.out_of_fold, second.out_of_fold)
    assert state() == before
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.startswith("lightning")] == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.slow
@BOTH_WAYS
def test_two_processes_train_what_one_does(n, d):
    vectors, targets = residuals(n, 2, d), torch.as_tensor(noisy(n, 2))
    ways = ({"accelerator": "cpu"}, {"devices": 2, "strategy": "ddp_spawn", "accelerator": "cpu"})
    one, two = (train(tensors(vectors), targets, by_thirds(n), config(trainer=way), kept=1) for way in ways)
    np.testing.assert_allclose(two.out_of_fold, one.out_of_fold, rtol=0, atol=1e-6)
    np.testing.assert_allclose(two.criterion, one.criterion, rtol=1e-9)
    np.testing.assert_array_equal(two.penalty, one.penalty)
