"""Probes trained by descent: each finds what is there, stops at its own best, and minds nobody else."""

from __future__ import annotations

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from probe_data import features, fit, planted, vectors
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from prefs.errors import UserError
from prefs.probes.data import ProbeData
from prefs.probes.descent import Descent, LinearBank
from prefs.probes.folds import Splits
from prefs.probes.train import Training, train

QUICK = Descent(learning_rate=1e-2, patience=20)


def trained(
    kind: str, x: torch.Tensor, targets: np.ndarray, *, penalties=(0.1,), descent=QUICK, epochs=150, **arguments
):
    splits = Splits.of(np.arange(len(x)) % 4, 0)
    settings = Training(kind=kind, penalties=penalties, descent=descent, max_epochs=epochs, batch_size=32)
    return train(features(x), torch.tensor(targets), splits, settings, kept=targets.shape[1], **arguments)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_planted_signal_is_found_at_its_site(kind, optimizer):
    x = vectors(160, 2, 8)
    y = planted(x, 1, 0.3)
    # Far from 0 and small: targets are centred and scaled while training.
    found = trained(kind, x, 50 + 0.01 * y[:, None], descent=Descent(optimizer, 1e-2, patience=20))
    assert found.best_sites()[:, 0].tolist() == [1] * 5
    r = np.corrcoef(found.out_of_fold[:, 1, 0], y)[0, 1]
    assert r > 0.9
    assert abs(np.corrcoef(found.out_of_fold[:, 0, 0], y)[0, 1]) < 0.4
    probe = found.probe(4, 1, 0, "y")
    assert np.corrcoef(probe.predict(x[:, 1]), y)[0, 1] > 0.9
    assert (probe.direction() is None) == (kind == "mlp")


def test_logistic_agrees_with_scikit_learn_where_it_converges():
    x = vectors(400, 1, 4)
    score = planted(x, 0, 0.0)
    y = (np.random.default_rng(0).random(400) < expit(1.5 * score)).astype(float)
    found = trained("logistic", x, y[:, None], penalties=(0.0,), descent=Descent(learning_rate=3e-2, patience=60))
    probe = found.probe(4, 0, 0, "good")
    splits = Splits.of(np.arange(400) % 4, 0)
    seen = ~splits.validation
    z = ((x[:, 0] - probe.mean) / probe.scale).numpy()
    peer = LogisticRegression(C=np.inf).fit(z[seen], y[seen])
    np.testing.assert_allclose(probe.predict(x[:, 0]), peer.predict_proba(z)[:, 1], atol=0.08)
    assert roc_auc_score(y, found.out_of_fold[:, 0, 0]) > 0.75


def test_ordinal_predicts_the_distribution_that_made_the_ratings():
    x = vectors(400, 1, 4)
    score = 2 * planted(x, 0, 0.0)
    rng = np.random.default_rng(0)
    rating = (score + rng.logistic(size=400))[:, None] > np.array([-2.0, 0.0, 1.0])
    shares = np.eye(4)[rating.sum(1)]
    found = trained(
        "ordinal",
        x,
        shares[:, None],
        penalties=(0.0,),
        descent=Descent(learning_rate=3e-2, patience=40),
        values=(1, 2, 3, 5),
    )
    below = expit(np.array([-2.0, 0.0, 1.0]) - score[:, None])
    p = np.diff(np.concatenate([np.zeros((400, 1)), below, np.ones((400, 1))], axis=1), axis=1)
    expected = p @ np.array([1, 2, 3, 5])
    assert np.abs(found.out_of_fold[:, 0, 0] - expected).mean() < 0.2
    thresholds = found.probe(4, 0, 0, "rating").tensors["thresholds"]
    assert (thresholds.diff() > 0).all()


def test_two_options_are_ordinal_too():
    x = vectors(100, 1, 4)
    shares = np.eye(2)[(planted(x, 0, 0.2) > 0).astype(int)]
    found = trained("ordinal", x, shares[:, None], values=(0, 1))
    assert roc_auc_score(shares[:, 1], found.out_of_fold[:, 0, 0]) > 0.9


def test_a_probe_is_the_same_whoever_is_trained_beside_it():
    x = vectors(80, 2, 6)
    y = np.stack([planted(x, 0, 0.5), planted(x, 1, 3.0)], axis=1)
    both = trained("linear", x, y, penalties=(0.01, 1.0), epochs=30)
    for target in (0, 1):
        alone = trained("linear", x, y[:, target : target + 1], penalties=(0.01, 1.0), epochs=30)
        np.testing.assert_allclose(both.out_of_fold[:, :, target], alone.out_of_fold[:, :, 0], atol=1e-3)
    single = trained("linear", x[:, 1:], y, penalties=(0.01, 1.0), epochs=30)
    np.testing.assert_allclose(both.out_of_fold[:, 1], single.out_of_fold[:, 0], atol=1e-3)


def test_noise_leaves_a_probe_where_it_began():
    x = vectors(80, 1, 30)
    y = np.random.default_rng(0).normal(size=(80, 1)) + 7
    found = trained("linear", x, y, epochs=60)
    assert np.abs(found.out_of_fold - 7).max() < 2  # least squares would be off by far more


def test_steps_are_those_of_adamw_with_each_penalty_as_its_decay():
    """A fit of one batch an epoch, followed by hand with PyTorch's own optimiser."""
    x, n = vectors(40, 1, 5), 40
    y, splits = planted(x, 0, 0.3), Splits.of(np.arange(40) % 2, 0)
    data = ProbeData(features(x), slice(0, 1), torch.tensor(y)[:, None], splits, batch_size=n)
    penalties, moments = (0.0, 5.0), data.moments(without_validation=True)
    descent = Descent(learning_rate=1e-2, patience=99)
    bank = LinearBank(data.features.sites, 5, data.targets, splits, penalties, moments, descent)
    fit(bank, data, max_epochs=25, precision="32-true")
    rows = torch.tensor(~splits.validation)  # of the last fit, which holds out none
    z = ((x[:, 0].double() - moments.mean[2, 0]) / moments.scale[2, 0])[rows].float()
    wanted = torch.tensor((y - y[rows].mean()) / y[rows].std())[rows].float()
    for at, penalty in enumerate(penalties):
        layer = torch.nn.Linear(5, 1)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        groups = [{"params": [layer.weight], "weight_decay": penalty}, {"params": [layer.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        for _ in range(25):
            optimizer.zero_grad()
            (layer(z)[:, 0] - wanted).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(bank.parts["weight"][2, 0, at, 0], layer.weight[0], rtol=1e-3, atol=1e-5)


def test_held_out_and_validation_tasks_train_nothing():
    x = vectors(60, 1, 5)
    y, splits = planted(x, 0, 0.3)[:, None], Splits.of(np.arange(60) % 3, 0)
    before = trained_weights(x, y, splits)
    others = y.copy()
    others[splits.group == 1] = 40.0
    others[splits.validation] = -40.0
    after = trained_weights(x, others, splits)
    torch.testing.assert_close(after[1], before[1])
    assert (after[0] - before[0]).abs().max() > 1e-3


def trained_weights(x: torch.Tensor, y: np.ndarray, splits: Splits) -> torch.Tensor:
    data = ProbeData(features(x), slice(0, 1), torch.tensor(y), splits, batch_size=16, seed=3)
    bank = LinearBank(
        data.features.sites, 5, data.targets, splits, (0.1,), data.moments(without_validation=True), QUICK
    )
    fit(bank, data, max_epochs=5, precision="32-true")
    return bank.parts["weight"].detach().clone()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_seed_decides_and_the_global_one_is_left_alone(kind):
    x = vectors(60, 1, 5)
    y = planted(x, 0, 1.0)[:, None]
    state = torch.get_rng_state()
    first = trained(kind, x, y, epochs=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert np.array_equal(first.out_of_fold, trained(kind, x, y, epochs=5).out_of_fold)


def test_a_learning_rate_that_diverges_leaves_the_probe_at_the_mean(caplog):
    x = vectors(60, 1, 5)
    y = planted(x, 0, 1.0)[:, None]
    found = trained("linear", x, y, descent=Descent("sgd", 1e6, patience=30), epochs=40)
    assert "some probes diverged" in caplog.text
    assert np.isfinite(found.out_of_fold).all()
    assert np.abs(found.out_of_fold - y.mean()).max() < 1


def test_lightnings_loggers_and_callbacks_are_the_users(tmp_path):
    x = vectors(60, 1, 5)
    splits = Splits.of(np.arange(60) % 3, 0)
    seen = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            seen.append(trainer.current_epoch)

    both = {"callbacks": [Watch()], "logger": CSVLogger(tmp_path, name="", version="")}
    settings = Training(kind="linear", penalties=(0.1,), max_epochs=4, trainer=both)
    train(features(x), torch.tensor(planted(x, 0, 0.5))[:, None], splits, settings, kept=1)
    assert seen == [0, 1, 2, 3]
    names, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"probe/loss", "probe/validation_loss", "probe/stopped"} <= set(names.split(","))
    assert rows


@pytest.mark.parametrize(
    ("trainer", "message"),
    [({"device": 2}, "unexpected keyword"), ({"accelerator": "warp"}, "accelerator"), ({"precision": "7"}, "7")],
)
def test_what_lightning_refuses_is_one_line(trainer, message):
    x = vectors(20, 1, 3)
    settings = Training(kind="ridge", trainer=trainer)
    with pytest.raises(UserError, match=rf"probe\.trainer: .*{message}") as caught:
        train(features(x), torch.zeros(20, 1), Splits.of(np.arange(20) % 2, 0), settings, kept=1)
    assert "\n" not in str(caught.value)
