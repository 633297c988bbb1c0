"""Ridge in closed form: the same as scikit-learn's, blind to what is held out, from one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from probe_data import features, fit, planted, ridge_bank, vectors
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from prefs.probes import train as train_module
from prefs.probes.data import ProbeData
from prefs.probes.folds import Splits
from prefs.probes.ridge import RidgeBank
from prefs.probes.train import Training, train

PENALTIES = (1e-3, 1e-1, 1.0, 1e3)
SHAPES = [(90, 20), (40, 60), (30, 30)]  # primal, dual, as many tasks as dimensions


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_penalty_and_fold_agrees_with_scikit_learn(n, d, dtype):
    x = vectors(n, 2, d).to(dtype)
    y = np.random.default_rng(1).normal(size=(n, 3)) + planted(x, 1, 0.5)[:, None]
    group = np.arange(n) % 4
    bank = ridge_bank(x, y, group, PENALTIES)
    assert bank.dual == (n <= d)
    for fold in range(5):
        seen = group != fold
        for site in range(2):
            wide = x[:, site].double().numpy()
            scaler = StandardScaler().fit(wide[seen])
            np.testing.assert_allclose(bank.mean[fold, site], scaler.mean_, rtol=1e-9)
            np.testing.assert_allclose(bank.scale[fold, site], scaler.scale_, rtol=1e-9)
            z = scaler.transform(wide)
            for at, penalty in enumerate(PENALTIES):
                peer = Ridge(alpha=penalty * seen.sum()).fit(z[seen], y[seen])
                mine = z @ bank.all_weight[fold, site, at].numpy().T + bank.all_bias[fold, site, at].numpy()
                np.testing.assert_allclose(mine, peer.predict(z), rtol=0, atol=1e-4 * y.std())


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_the_criterion_is_generalised_cross_validation(n, d):
    x, group = vectors(n, 1, d), np.arange(n) % 3
    y = planted(x, 0, 1.0)[:, None]
    bank = ridge_bank(x, y, group, PENALTIES)
    for fold in range(4):
        seen = group != fold
        z = StandardScaler().fit_transform(x[seen, 0].double().numpy())
        m = len(z)
        for at, penalty in enumerate(PENALTIES):
            hat = z @ np.linalg.solve(z.T @ z + penalty * m * np.eye(d), z.T) + 1 / m
            residual = y[seen] - hat @ y[seen]
            wanted = (residual**2).mean() / (1 - np.trace(hat) / m) ** 2
            assert float(bank.criterion[fold, 0, at, 0]) == pytest.approx(wanted, rel=1e-5)
        assert int(bank.chosen[fold, 0, 0]) == int(bank.criterion[fold, 0, :, 0].argmin())
        chosen = bank.all_weight[fold, 0, int(bank.chosen[fold, 0, 0])]
        torch.testing.assert_close(bank.weight[fold, 0].detach(), chosen)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_held_out_tasks_never_touch_their_fit(n, d):
    x, group = vectors(n, 2, d), np.arange(n) % 4
    y = planted(x, 0, 0.5)[:, None]
    before = ridge_bank(x, y, group, PENALTIES)
    changed, others = x.clone(), y.copy()
    changed[group == 2] *= 1.5
    others[group == 2] += 100
    after = ridge_bank(changed, others, group, PENALTIES)
    for name in ("mean", "scale", "all_weight", "criterion"):
        torch.testing.assert_close(getattr(after, name)[2], getattr(before, name)[2], rtol=1e-6, atol=1e-9)
    assert (after.chosen[2] == before.chosen[2]).all()
    for other in (0, 1, 3, 4):
        assert (after.all_weight[other] - before.all_weight[other]).abs().max() > 1e-3


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_a_constant_feature_gets_no_weight(n, d):
    x = vectors(n, 1, d)
    x[:, :, 5] = 0.1
    x[:, :, 6] = 0.0
    bank = ridge_bank(x, planted(x[:, :, :5], 0, 0.5)[:, None], np.arange(n) % 3, (1e-3,))
    assert bank.weight[:, :, :, 5:7].abs().max() < 1e-9


def test_batches_and_groups_of_sites_change_nothing(monkeypatch):
    x = vectors(80, 5, 12)
    y = torch.tensor(np.stack([planted(x, 3, 0.5), planted(x, 1, 2.0)], axis=1))
    splits, training = Splits.of(np.arange(80) % 4, 0), Training(penalties=PENALTIES)
    whole = train(features(x), y, splits, training, kept=2)
    monkeypatch.setattr(train_module, "GROUP_BYTES", 1)
    monkeypatch.setattr("prefs.probes.data.BATCH_NUMBERS", 12 * 7)
    parts = train(features(x), y, splits, training, kept=2)
    np.testing.assert_allclose(parts.out_of_fold, whole.out_of_fold, atol=1e-5)
    assert (parts.chosen == whole.chosen).all()
    assert whole.best_sites()[:, 0].tolist() == [3] * 5


def test_many_targets_are_the_single_ones():
    x = vectors(40, 2, 60)
    y = np.random.default_rng(0).normal(size=(40, 7))
    together = ridge_bank(x, y, np.arange(40) % 4, PENALTIES)
    for at in (0, 6):
        alone = ridge_bank(x, y[:, at : at + 1], np.arange(40) % 4, PENALTIES)
        torch.testing.assert_close(alone.all_weight[:, :, :, 0], together.all_weight[:, :, :, at], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("penalties", [(), (0.0,), (1.0, -1.0), (float("nan"),)])
def test_penalties_that_are_none_are_refused(penalties):
    x = vectors(20, 1, 4)
    data = ProbeData(features(x), slice(0, 1), torch.zeros(20, 1), Splits.of(np.arange(20) % 2, 0))
    with pytest.raises(ValueError, match="penalties"):
        RidgeBank(data.features.sites, 4, 1, data.splits, penalties, data.reference())


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d"), SHAPES[:2])
def test_two_devices_add_up_to_one(n, d):
    x = vectors(n, 2, d)
    y = torch.tensor(planted(x, 1, 0.5))[:, None]
    splits = Splits.of(np.arange(n) % 4, 0)
    one = train(features(x), y, splits, Training(penalties=PENALTIES), kept=1)
    both = {"devices": 2, "strategy": "ddp_spawn", "accelerator": "cpu"}
    two = train(features(x), y, splits, Training(penalties=PENALTIES, trainer=both), kept=1)
    np.testing.assert_allclose(two.out_of_fold, one.out_of_fold, atol=1e-5)
    assert (two.chosen == one.chosen).all()


def test_a_pass_of_one_row_at_a_time():
    x = vectors(30, 1, 6)
    y = planted(x, 0, 0.5)[:, None]
    splits = Splits.of(np.arange(30) % 3, 0)
    data = ProbeData(features(x), slice(0, 1), torch.tensor(y), splits, batch_size=None)
    data._batch_size = 1
    bank = RidgeBank(data.features.sites, 6, 1, splits, PENALTIES, data.reference(), keep_all=True)
    fit(bank, data)
    torch.testing.assert_close(bank.all_weight, ridge_bank(x, y, np.arange(30) % 3, PENALTIES).all_weight)
