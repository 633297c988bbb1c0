"""Probes that descend: what scikit-learn, statsmodels and PyTorch's own optimisers find, each stopped by itself."""

from __future__ import annotations

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from simulated_vectors import planted, probe_config, residuals, tensors
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from statsmodels.miscmodels.ordinal_model import OrderedModel

from prefs.errors import UserError
from prefs.probes import train as train_module
from prefs.probes.data import ProbeData
from prefs.probes.descent import DescentBank, LinearBank, log_probabilities
from prefs.probes.folds import Splits
from prefs.probes.probe import option_probabilities
from prefs.probes.scores import auc_columns, r2_columns
from prefs.probes.train import bank_class, fit, train

KINDS = ["linear", "logistic", "ordinal", "mlp"]
# Ends near the optimum: a large step first would do as well, but steps of AdamW do not shrink by themselves.
LONG = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "patience": 10_000}


def shares(codes: np.ndarray, options: int) -> torch.Tensor:
    """[n, 1, V] all of the rating on one option."""
    return torch.nn.functional.one_hot(torch.as_tensor(codes), options).double()[:, None]


def bank_of(vectors, targets, splits, kind, penalties, values=(), **settings) -> DescentBank:
    config = probe_config(kind, penalties=list(penalties), **settings)
    data = ProbeData(
        tensors(vectors), slice(0, vectors.shape[1]), torch.as_tensor(targets), splits,
        values=values, batch_size=config.batch_size, seed=config.seed,
    )  # fmt: skip
    bank = bank_class(config)(data, config)
    assert isinstance(bank, DescentBank)
    fit(bank)
    return bank


def no_validation(n: int) -> Splits:
    """Two folds, and a task of each that validates: nearly all train."""
    return Splits(np.arange(n) % 2, np.arange(n) < 2)


def last(bank: DescentBank) -> DescentBank:
    """The bank with the parameters it ended with, in place of its best."""
    for name, part in bank.parts.items():
        bank.best[name].data = part.detach().clone()
    return bank


# --- against others' optima


def test_linear_without_penalty_is_least_squares():
    vectors = residuals(80, 2, 5, dtype=torch.float32)
    y = np.stack([planted(vectors, 1, 0.6), planted(vectors, 0, 0.3) * 100], axis=1)
    splits = no_validation(80)
    bank = last(bank_of(vectors, y, splits, "linear", [1e-9], batch_size=100, max_epochs=600, **LONG))
    for fold in range(3):
        rows = splits.training(fold) & ~splits.validation
        for layer in range(2):
            x = np.column_stack([np.ones(80), vectors[:, layer].double().numpy()])
            expected = x @ np.linalg.lstsq(x[rows], y[rows], rcond=None)[0]
            predicted = bank.predict_fit(vectors, fold)[:, layer].numpy()
            np.testing.assert_allclose((predicted - expected) / y.std(0), 0, atol=2e-3)


def test_logistic_is_scikit_learns():
    vectors = residuals(150, 1, 4, dtype=torch.float32)
    y = (planted(vectors, 0, 0.6) > 5.5).astype(float)
    splits = no_validation(150)
    bank = last(bank_of(vectors, y[:, None], splits, "logistic", [0.0], batch_size=200, max_epochs=800, **LONG))
    for fold in range(3):
        rows = splits.training(fold) & ~splits.validation
        z = StandardScaler().fit(vectors[rows, 0].numpy()).transform(vectors[:, 0].numpy())
        expected = LogisticRegression(C=1e8, tol=1e-8, max_iter=1000).fit(z[rows], y[rows]).predict_proba(z)[:, 1]
        np.testing.assert_allclose(bank.predict_fit(vectors, fold)[:, 0, 0], expected, atol=0.01)


@pytest.mark.slow
def test_ordinal_is_statsmodels_ordered_logit():
    vectors = residuals(300, 1, 3, dtype=torch.float32)
    z = StandardScaler().fit_transform(vectors[:, 0].numpy())
    latent = z @ [1.0, -0.7, 0.3] + np.random.default_rng(0).logistic(size=300)
    codes, values, splits = np.digitize(latent, [-1.5, 0.2, 1.0]), (1.0, 2.0, 4.0, 8.0), no_validation(300)
    bank = last(
        bank_of(vectors, shares(codes, 4), splits, "ordinal", [0.0], values, batch_size=400, max_epochs=800, **LONG)
    )
    rows = ~splits.validation
    z = StandardScaler().fit(vectors[rows, 0].numpy()).transform(vectors[:, 0].numpy())
    peer = OrderedModel(codes[rows], z[rows], distr="logit").fit(method="bfgs", disp=False)
    expected = np.asarray(peer.predict(z)) @ values
    np.testing.assert_allclose(bank.predict_fit(vectors, 2)[:, 0, 0], expected, atol=0.02)
    thresholds = bank.tensors(2)["thresholds"][0, 0].numpy()
    np.testing.assert_allclose(thresholds, peer.model.transform_threshold_params(peer.params)[1:-1], atol=0.02)


def test_log_probabilities_do_not_underflow():
    thresholds = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    score = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(log_probabilities(score, thresholds).exp(), option_probabilities(score, thresholds))
    far = torch.tensor([-200.0, 200.0], requires_grad=True)
    logs = log_probabilities(far, thresholds.float())
    torch.testing.assert_close(logs[:, 0], torch.tensor([0.0, -201.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(logs[:, 3], torch.tensor([-202.0, 0.0]), atol=1e-3, rtol=0)
    # However wrong a score is, its gradient says where to go.
    (-logs[0, 3]).backward()
    assert far.grad is not None
    assert far.grad[0] == pytest.approx(-1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_penalties_are_decoupled_weight_decay(optimizer):
    """The same steps as PyTorch's own AdamW with weight_decay; of SGD by hand, whose decay in PyTorch is coupled."""
    vectors, rate, penalties = residuals(40, 1, 6, dtype=torch.float32), 0.05, (0.0, 0.3, 4.0)
    y, splits = planted(vectors, 0, 0.8), no_validation(40)
    settings = {"optimizer": optimizer, "learning_rate": rate, "momentum": 0.8, "patience": 1000}
    bank = bank_of(vectors, y[:, None], splits, "linear", penalties, batch_size=100, max_epochs=25, **settings)
    rows = ~splits.validation
    z = torch.as_tensor(StandardScaler().fit(vectors[rows, 0]).transform(vectors[rows, 0])).float()
    wanted = torch.as_tensor((y[rows] - y[rows].mean()) / y[rows].std()).float()
    for number, penalty in enumerate(penalties):
        weight, bias = torch.zeros(6, requires_grad=True), torch.zeros(1, requires_grad=True)
        if optimizer == "adamw":
            groups = [{"params": [weight], "weight_decay": penalty}, {"params": [bias], "weight_decay": 0.0}]
            steps = torch.optim.AdamW(groups, lr=rate)
        else:
            steps = torch.optim.SGD([weight, bias], lr=rate, momentum=0.8)
        for _ in range(25):
            steps.zero_grad()
            (z @ weight + bias - wanted).square().mean().backward()
            if optimizer == "sgd":
                with torch.no_grad():
                    weight.mul_(1 - rate * penalty)
            steps.step()
        torch.testing.assert_close(
            bank.parts["weight"][2, 0, number, 0].detach(), weight.detach(), rtol=1e-4, atol=1e-5
        )
    assert bank.parts["weight"][2, 0, 2].norm() < 0.9 * bank.parts["weight"][2, 0, 0].norm()


# --- what each kind finds


@pytest.mark.parametrize("kind", KINDS)
def test_planted_signal_is_found_at_its_layer(kind):
    vectors = residuals(200, 3, 8)
    y, binary = planted(vectors, 1, 0.9), kind == "logistic"
    numbers = (y > 5).astype(float) if binary else np.clip(np.round(y), 3, 7)
    targets = shares(numbers.astype(int) - 3, 5) if kind == "ordinal" else torch.as_tensor(numbers)[:, None]
    config = probe_config(kind, penalties=[1e-2, 1.0], max_epochs=60, learning_rate=0.02, hidden=8)
    splits = Splits.draw(np.arange(200) % 3, 0)
    trained = train(tensors(vectors), targets, splits, config, kept=1, values=(3, 4, 5, 6, 7))
    scores = (auc_columns if binary else r2_columns)(trained.out_of_fold, numbers[:, None])[:, 0]
    assert scores[1] > (0.9 if binary else 0.6)
    assert scores[[0, 2]].max() < (0.65 if binary else 0.15)
    assert trained.best_sites()[:, 0].tolist() == [1] * 4
    # A probe by itself is the bank's.
    for fold in range(3):
        held_out = splits.group == fold
        predicted = trained.probe(fold, 1, 0, "y").predict(vectors[held_out, 1])
        np.testing.assert_allclose(predicted, trained.out_of_fold[held_out, 1, 0], rtol=0, atol=1e-4)


# --- each by itself


@pytest.mark.parametrize("kind", ["ridge", "linear", "mlp"])
def test_sites_in_groups_are_the_same_probes(kind, monkeypatch):
    vectors, splits = residuals(40, 3, 5), Splits.draw(np.arange(40) % 2, 0)
    targets = torch.as_tensor(planted(vectors, 0, 0.9))[:, None]
    config = probe_config(kind, penalties=[0.1], batch_size=16, max_epochs=8, learning_rate=0.01, hidden=4)
    whole = train(tensors(vectors), targets, splits, config, kept=1)
    monkeypatch.setattr(train_module, "GROUP_BYTES", 1)
    groups = train(tensors(vectors), targets, splits, config, kept=1)
    np.testing.assert_allclose(groups.out_of_fold, whole.out_of_fold, rtol=0, atol=1e-4)
    np.testing.assert_allclose(groups.criterion, whole.criterion, rtol=1e-4)


def test_each_probe_keeps_its_best_epoch(monkeypatch):
    """Against the losses of every epoch, as they came."""
    losses: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    before = DescentBank.on_validation_epoch_end

    def watched(self: DescentBank) -> None:
        losses.append((self._total / self._count[:, None, None, None]).clone())
        weights.append(self.parts["weight"].detach().clone())
        before(self)

    monkeypatch.setattr(LinearBank, "on_validation_epoch_end", watched)
    vectors = residuals(60, 1, 30)
    targets = np.stack([planted(vectors, 0, 0.8), np.random.default_rng(5).normal(size=60)], axis=1)
    settings = {"batch_size": 16, "max_epochs": 100, "learning_rate": 0.01, "patience": 3}
    bank = bank_of(vectors, targets, Splits.draw(np.arange(60) % 3, 0), "linear", (0.0, 1.0), **settings)
    ended = set()
    for index in np.ndindex(*bank.shape):
        best, stale, kept = np.inf, 0, -1
        for epoch, loss in enumerate(losses):
            if stale < 3:
                better = loss[index].item() < best
                best, stale, kept = (loss[index].item(), 0, epoch) if better else (best, stale + 1, kept)
        ended.add(kept)
        assert bank.criterion[index] == pytest.approx(best, rel=1e-6)
        assert torch.equal(bank.best["weight"][index], weights[kept][index])
    assert len(ended) > 2
    assert bank.stopped().all() == (len(losses) < 100)
    assert torch.equal(bank.chosen, bank.criterion.argmin(2))


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_and_validation_tasks_never_train(kind):
    vectors = residuals(48, 1, 5, dtype=torch.float32)
    codes = (planted(vectors, 0, 0.8) > 5).astype(int)
    splits = Splits.draw(np.arange(48) % 3, 0)

    def trained(vectors: torch.Tensor, codes: np.ndarray) -> DescentBank:
        # In one batch, so that the tasks in it are always the same; and to the end: validation has no say in it.
        settings = {"batch_size": 100, "max_epochs": 15, "learning_rate": 0.02, "patience": 100, "hidden": 4}
        targets = shares(codes, 2) if kind == "ordinal" else codes[:, None]
        return bank_of(vectors, targets, splits, kind, [0.1], (0, 1), **settings)

    before = trained(vectors, codes)
    for mine, fits in ((splits.group == 1, [1]), (splits.validation, [0, 1, 2, 3])):
        changed, others = vectors.clone(), codes.copy()
        changed[mine] = 1e25  # squared, this is infinite in float32
        others[mine] = 1 - others[mine]
        after = trained(changed, others)
        assert torch.equal(after.mean[fits], before.mean[fits])
        for name, part in before.parts.items():
            torch.testing.assert_close(after.parts[name][fits], part[fits], rtol=1e-3, atol=1e-5)
    if kind in ("linear", "logistic"):
        others = np.where(splits.group == 1, 1 - codes, codes)
        after = trained(vectors, others)
        torch.testing.assert_close(after.criterion[1], before.criterion[1])
        assert not torch.equal(after.parts["weight"][0], before.parts["weight"][0])


def test_is_determined_by_the_seed():
    vectors, splits = residuals(40, 1, 5), Splits.draw(np.arange(40) % 2, 0)
    weights = []
    for seed in (0, 0, 1):
        targets = planted(vectors, 0, 0.8)[:, None]
        bank = bank_of(vectors, targets, splits, "mlp", [0.1], batch_size=8, max_epochs=4, hidden=3, seed=seed)
        weights.append(bank.parts["hidden_weight"].detach())
        torch.rand(3)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- what goes wrong


def test_probes_that_diverge_or_do_not_stop_are_told_and_leave_others_alone(caplog):
    vectors = residuals(40, 1, 6, dtype=torch.float32)
    targets, splits = torch.as_tensor(planted(vectors, 0, 0.8))[:, None], Splits.draw(np.arange(40) % 2, 0)

    def trained(**settings):
        caplog.clear()
        return train(tensors(vectors), targets, splits, probe_config("linear", batch_size=8, **settings), kept=1)

    wild = trained(penalties=[0.1, 1.0], optimizer="sgd", learning_rate=50.0, patience=300)
    assert "6 of 6 probes diverged (linear)" in caplog.text
    assert "lower probe.learning_rate (50)" in caplog.text
    assert np.isfinite(wild.out_of_fold).all()
    trained(penalties=[0.1], max_epochs=2)
    assert "3 of 3 probes (linear) had not stopped after 2 epochs: raise probe.max_epochs" in caplog.text
    trained(penalties=[0.1], max_epochs=300, learning_rate=0.05)
    assert caplog.text == ""


def test_lightnings_loggers_and_callbacks_are_the_users(tmp_path):
    epochs = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            epochs.append(trainer.current_epoch)

    x = residuals(60, 1, 5)
    both = {"accelerator": "cpu", "callbacks": [Watch()], "logger": CSVLogger(tmp_path, name="", version="")}
    config = probe_config("linear", penalties=[0.1], max_epochs=4, trainer=both)
    train(tensors(x), torch.tensor(planted(x, 0, 0.5))[:, None], Splits.draw(np.arange(60) % 3, 0), config, kept=1)
    assert epochs == [0, 1, 2, 3]
    names, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"probe/loss", "probe/validation_loss", "probe/stopped"} <= set(names.split(","))
    assert rows


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"device": 2}, r"probe\.trainer: got 'device'; allowed: one of accelerator, devices"),
        ({"fast_dev_run": True}, r"probe\.trainer: got 'fast_dev_run'"),
        ({"limit_train_batches": 1}, r"probe\.trainer: got 'limit_train_batches'"),
        ({"gradient_clip_val": 1.0}, r"probe\.trainer: .*clipping is not supported"),
        ({"accelerator": "cpu", "logger": 3}, r"probe\.trainer\.logger: got 3; allowed: Lightning's, by _target_"),
        ({"accelerator": "cpu", "callbacks": [3]}, r"probe\.trainer\.callbacks: got 3; allowed"),
        ({"accelerator": "warp"}, r"probe\.trainer: .*accelerator"),
        ({"precision": "bf16-mixed"}, r"probe\.trainer: got 'precision'"),
        ({"max_epochs": 3}, r"probe\.trainer: got 'max_epochs'"),
        # A strategy that begins the whole command again.
        ({"devices": 2, "strategy": "ddp", "accelerator": "cpu"}, r"probe\.trainer\.strategy: got 'ddp'; allowed"),
    ],
)
def test_what_cannot_be_is_one_line(trainer, message):
    config, splits = probe_config("ridge", trainer=trainer), Splits.draw(np.arange(20) % 2, 0)
    with pytest.raises(UserError, match=message) as caught:
        train(tensors(residuals(20, 1, 3)), torch.zeros(20, 1), splits, config, kept=1)
    assert "\n" not in str(caught.value)
