"""Probes that descend: what scikit-learn, statsmodels and PyTorch's own optimisers find, each stopped by itself."""

from __future__ import annotations

import random

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from simulated_vectors import planted, residuals, tensors
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from statsmodels.miscmodels.ordinal_model import OrderedModel

from prefs.errors import UserError
from prefs.probes import train as train_module
from prefs.probes.descent import Descent, DescentBank, EachStopsAlone, LinearBank, log_probabilities
from prefs.probes.folds import Splits
from prefs.probes.probe import option_probabilities
from prefs.probes.scores import auc_columns, r2_columns
from prefs.probes.train import Training, train

CPU = {"accelerator": "cpu"}
# Ends near the optimum: a large step first would do as well, but steps of AdamW do not shrink by themselves.
LONG = Descent(optimizer="sgd", learning_rate=0.1, momentum=0.9, patience=10_000)


def shares(codes: np.ndarray, options: int) -> torch.Tensor:
    """[n, 1, V] all of the rating on one option."""
    return torch.nn.functional.one_hot(torch.as_tensor(codes), options).double()[:, None]


def bank_of(vectors, targets, splits, training, values=()) -> DescentBank:
    """A bank trained as `train` does."""
    data, bank = train_module._prepare(
        tensors(vectors), slice(0, vectors.shape[1]), torch.as_tensor(targets), splits, training, values
    )
    train_module._fit(bank, data, training)
    assert isinstance(bank, DescentBank)
    return bank


def no_validation(n: int) -> Splits:
    """Two folds, and a single task that validates: nearly all train."""
    validation = np.zeros(n, dtype=bool)
    validation[[0, 1]] = True
    return Splits(np.arange(n) % 2, validation)


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
    training = Training("linear", (1e-9,), 100, 600, LONG, CPU)
    bank = last(bank_of(vectors, y, splits, training))
    for fit in range(3):
        rows = splits.training(fit) & ~splits.validation
        for layer in range(2):
            x = np.column_stack([np.ones(80), vectors[:, layer].double().numpy()])
            expected = x @ np.linalg.lstsq(x[rows], y[rows], rcond=None)[0]
            predicted = bank.predict_fit(vectors, fit)[:, layer].numpy()
            np.testing.assert_allclose((predicted - expected) / y.std(0), 0, atol=2e-3)


def test_logistic_is_scikit_learns():
    vectors = residuals(150, 1, 4, dtype=torch.float32)
    y = (planted(vectors, 0, 0.6) > 5.5).astype(float)
    splits = no_validation(150)
    bank = last(bank_of(vectors, y[:, None], splits, Training("logistic", (0.0,), 200, 800, LONG, CPU)))
    for fit in range(3):
        rows = splits.training(fit) & ~splits.validation
        scaler = StandardScaler().fit(vectors[rows, 0].numpy())
        z = scaler.transform(vectors[:, 0].numpy())
        expected = LogisticRegression(C=1e8, tol=1e-8, max_iter=1000).fit(z[rows], y[rows]).predict_proba(z)[:, 1]
        np.testing.assert_allclose(bank.predict_fit(vectors, fit)[:, 0, 0], expected, atol=0.01)


@pytest.mark.slow
def test_ordinal_is_statsmodels_ordered_logit():
    vectors = residuals(300, 1, 3, dtype=torch.float32)
    rng = np.random.default_rng(0)
    z = StandardScaler().fit_transform(vectors[:, 0].numpy())
    latent = z @ [1.0, -0.7, 0.3] + rng.logistic(size=300)
    codes = np.digitize(latent, [-1.5, 0.2, 1.0])
    values = (1.0, 2.0, 4.0, 8.0)
    splits = no_validation(300)
    training = Training("ordinal", (0.0,), 400, 800, LONG, CPU)
    bank = last(bank_of(vectors, shares(codes, 4), splits, training, values))
    rows = ~splits.validation
    z = StandardScaler().fit(vectors[rows, 0].numpy()).transform(vectors[:, 0].numpy())
    peer = OrderedModel(codes[rows], z[rows], distr="logit").fit(method="bfgs", disp=False)
    expected = np.asarray(peer.predict(z)) @ values
    np.testing.assert_allclose(bank.predict_fit(vectors, 2)[:, 0, 0], expected, atol=0.02)
    thresholds = bank.tensors(2)["thresholds"][0, 0].numpy()
    np.testing.assert_allclose(thresholds, peer.model.transform_threshold_params(peer.params)[1:-1], atol=0.02)


@pytest.mark.slow
def test_ordinal_of_two_options_is_logistic():
    vectors = residuals(120, 1, 4, dtype=torch.float32)
    codes = (planted(vectors, 0, 0.6) > 5).astype(int)
    splits = no_validation(120)
    ordinal = last(bank_of(vectors, shares(codes, 2), splits, Training("ordinal", (0.0,), 200, 500, LONG, CPU), (0, 1)))
    logistic = last(bank_of(vectors, codes[:, None], splits, Training("logistic", (0.0,), 200, 500, LONG, CPU)))
    np.testing.assert_allclose(ordinal.predict_fit(vectors, 2), logistic.predict_fit(vectors, 2), atol=5e-3)


def test_log_probabilities_do_not_underflow():
    thresholds = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    score = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(log_probabilities(score, thresholds).exp(), option_probabilities(score, thresholds))
    far = torch.tensor([-200.0, 200.0], requires_grad=True)
    found = log_probabilities(far, thresholds.float())
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, -201.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[:, 3], torch.tensor([-202.0, 0.0]), atol=1e-3, rtol=0)
    # However wrong a score is, its gradient says where to go.
    (-found[0, 3]).backward()
    assert far.grad is not None
    assert far.grad[0] == pytest.approx(-1)


# --- the optimiser


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_penalties_are_decoupled_weight_decay(optimizer):
    """The same steps as PyTorch's own AdamW with weight_decay; of SGD by hand, whose decay in PyTorch is coupled."""
    vectors, rate, penalties = residuals(40, 1, 6, dtype=torch.float32), 0.05, (0.0, 0.3, 4.0)
    y = planted(vectors, 0, 0.8)
    splits = no_validation(40)
    descent = Descent(optimizer=optimizer, learning_rate=rate, momentum=0.8, patience=1000)
    training = Training("linear", penalties, 100, 25, descent, CPU)
    bank = bank_of(vectors, y[:, None], splits, training)
    rows = ~splits.validation
    z = torch.as_tensor(StandardScaler().fit(vectors[rows, 0]).transform(vectors[rows, 0])).float()
    wanted = torch.as_tensor((y[rows] - y[rows].mean()) / y[rows].std()).float()
    for at, penalty in enumerate(penalties):
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
        found = bank.parts["weight"][2, 0, at, 0].detach()
        torch.testing.assert_close(found, weight.detach(), rtol=1e-4, atol=1e-5)
    assert bank.parts["weight"][2, 0, 2].norm() < 0.9 * bank.parts["weight"][2, 0, 0].norm()


def test_a_decay_beyond_zero_stays_at_zero():
    vectors = residuals(40, 1, 6, dtype=torch.float32)
    training = Training("linear", (1e3,), 100, 30, Descent("sgd", learning_rate=0.1), CPU)
    bank = bank_of(vectors, planted(vectors, 0, 0.8)[:, None], no_validation(40), training)
    assert not bank.diverged.any()
    assert bank.parts["weight"].abs().max() < 10


# --- what each kind finds


@pytest.mark.parametrize("kind", ["linear", "logistic", "ordinal", "mlp"])
def test_planted_signal_is_found_at_its_layer(kind):
    vectors = residuals(200, 3, 8)
    y = planted(vectors, 1, 0.9)
    binary = kind == "logistic"
    numbers = (y > 5).astype(float) if binary else np.clip(np.round(y), 3, 7)
    targets = torch.as_tensor(numbers)[:, None]
    if kind == "ordinal":
        targets = shares(numbers.astype(int) - 3, 5)
    training = Training(kind, (1e-2, 1.0), 64, 60, Descent(learning_rate=0.02, hidden=8), CPU)
    splits = Splits.of(np.arange(200) % 3, 0)
    trained = train(tensors(vectors), targets, splits, training, kept=1, values=(3, 4, 5, 6, 7))
    scores = (auc_columns if binary else r2_columns)(trained.out_of_fold, numbers[:, None])[:, 0]
    floor = 0.5 if binary else 0.0
    assert scores[1] > (0.9 if binary else 0.6)
    assert scores[[0, 2]].max() < floor + 0.15
    assert trained.best_sites()[:, 0].tolist() == [1] * 4
    # A probe by itself is the bank's.
    for fold in range(3):
        held_out = splits.group == fold
        predicted = trained.probe(fold, 1, 0, "y").predict(vectors[held_out, 1])
        np.testing.assert_allclose(predicted, trained.out_of_fold[held_out, 1, 0], rtol=0, atol=1e-4)


def test_mlp_finds_what_no_line_can():
    vectors = residuals(300, 1, 3, dtype=torch.float32)
    z = StandardScaler().fit_transform(vectors[:, 0])
    y = z[:, 0] ** 2 + 0.1 * np.random.default_rng(0).normal(size=300)
    splits, targets = Splits.of(np.arange(300) % 2, 0), torch.as_tensor(y)[:, None]
    descent = Descent(learning_rate=0.03, hidden=16, patience=20)
    line, perceptron = (
        train(tensors(vectors), targets, splits, Training(kind, (1e-3,), 64, 80, descent, CPU), kept=1)
        for kind in ("linear", "mlp")
    )
    assert r2_columns(line.out_of_fold, y[:, None])[0, 0] < 0.3
    assert r2_columns(perceptron.out_of_fold, y[:, None])[0, 0] > 0.8


@pytest.mark.slow
def test_ordinal_learns_from_shares():
    """A half of each option is as two ratings."""
    vectors = residuals(60, 1, 3, dtype=torch.float32)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 3, size=(2, 60))
    soft = (shares(first, 3) + shares(second, 3)) / 2
    training = Training("ordinal", (0.0,), 500, 300, LONG, CPU)
    splits = no_validation(60)
    half = last(bank_of(vectors, soft, splits, training, (1, 2, 3)))
    twice = Splits(np.tile(splits.group, 2), np.tile(splits.validation, 2))
    doubled = torch.cat([shares(first, 3), shares(second, 3)])
    both = last(bank_of(torch.cat([vectors, vectors]), doubled, twice, training, (1, 2, 3)))
    np.testing.assert_allclose(half.predict_fit(vectors, 2), both.predict_fit(vectors, 2), atol=1e-3)


# --- each by itself


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_two_targets_at_once_are_each_by_itself(kind):
    """Also where one stops long before the other, and would later become better again."""
    vectors = residuals(60, 2, 6)
    targets = np.stack([planted(vectors, 0, 0.95), np.random.default_rng(5).normal(size=60)], axis=1)
    splits = Splits.of(np.arange(60) % 3, 0)
    training = Training(kind, (1e-3, 1.0), 16, 60, Descent(learning_rate=0.01, patience=2, hidden=4), CPU)
    together = bank_of(vectors, targets, splits, training)
    epochs = []
    for t in range(2):
        alone = bank_of(vectors, targets[:, [t]], splits, training)
        torch.testing.assert_close(together.criterion[..., [t]], alone.criterion, rtol=1e-4, atol=1e-6)
        for name in alone.best:
            torch.testing.assert_close(together.best[name][:, :, :, [t]], alone.best[name], rtol=1e-3, atol=1e-5)
        epochs.append(alone.trainer.current_epoch)
    assert len(set(epochs)) == 2


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_sites_in_groups_are_the_same_probes(kind, monkeypatch):
    vectors, splits = residuals(40, 3, 5), Splits.of(np.arange(40) % 2, 0)
    targets = torch.as_tensor(planted(vectors, 0, 0.9))[:, None]
    training = Training(kind, (0.1,), 16, 8, Descent(learning_rate=0.01, hidden=4), CPU)
    whole = train(tensors(vectors), targets, splits, training, kept=1)
    monkeypatch.setattr(train_module, "GROUP_BYTES", 1)
    groups = train(tensors(vectors), targets, splits, training, kept=1)
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
    training = Training("linear", (0.0, 1.0), 16, 100, Descent(learning_rate=0.01, patience=3), CPU)
    bank = bank_of(vectors, targets, Splits.of(np.arange(60) % 3, 0), training)
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


def test_training_ends_with_the_epoch_in_which_the_last_probe_stops():
    vectors = residuals(30, 1, 4)
    training = Training("linear", (1.0,), 100, 500, Descent(learning_rate=1e-12, patience=4, min_delta=1.0), CPU)
    bank = bank_of(vectors, planted(vectors, 0, 0.5)[:, None], Splits.of(np.arange(30) % 2, 0), training)
    assert bank.trainer.current_epoch == 4  # where it began is better than none, and none of four epochs better
    assert any(isinstance(each, EachStopsAlone) for each in bank.trainer.callbacks)


# --- blindness


@pytest.mark.parametrize("kind", ["linear", "logistic", "ordinal", "mlp"])
def test_held_out_and_validation_tasks_never_train(kind):
    vectors = residuals(48, 1, 5, dtype=torch.float32)
    codes = (planted(vectors, 0, 0.8) > 5).astype(int)
    splits = Splits.of(np.arange(48) % 3, 0)
    # In one batch, so that the tasks in it are always the same; and to the end, so that validation has no say in it.
    training = Training(kind, (0.1,), 100, 15, Descent(learning_rate=0.02, patience=100, hidden=4), CPU)

    def trained(vectors: torch.Tensor, codes: np.ndarray) -> DescentBank:
        return bank_of(vectors, shares(codes, 2) if kind == "ordinal" else codes[:, None], splits, training, (0, 1))

    before = trained(vectors, codes)
    for mine, fits in ((splits.group == 1, [1]), (splits.validation, [0, 1, 2, 3])):
        changed, others = vectors.clone(), codes.copy()
        changed[mine] = 1e25  # squared, this is infinite in float32
        others[mine] = 1 - others[mine]
        after = trained(changed, others)
        for name, part in before.parts.items():
            torch.testing.assert_close(after.parts[name][fits], part[fits], rtol=1e-3, atol=1e-5)
            assert torch.equal(after.mean[fits], before.mean[fits])
        assert torch.equal(after.center[fits], before.center[fits])
    if kind in ("linear", "logistic"):
        others = codes.copy()
        others[splits.group == 1] = 1 - others[splits.group == 1]
        after = trained(vectors, others)
        torch.testing.assert_close(after.criterion[1], before.criterion[1])
        assert not torch.equal(after.parts["weight"][0], before.parts["weight"][0])


def test_is_determined_by_the_seeds_and_touches_no_global_state():
    vectors = residuals(40, 1, 5)
    targets = planted(vectors, 0, 0.8)[:, None]
    splits = Splits.of(np.arange(40) % 2, 0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = []
    for order, start in ((0, 0), (0, 0), (1, 0), (0, 1)):
        training = Training("mlp", (0.1,), 8, 4, Descent(learning_rate=0.01, hidden=3, seed=start), CPU, seed=order)
        found.append(bank_of(vectors, targets, splits, training).parts["hidden_weight"].detach())
        torch.rand(3)
        torch.set_rng_state(states[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])

    before = torch.get_rng_state()
    bank_of(vectors, targets, splits, Training("mlp", (0.1,), 8, 2, Descent(hidden=3), CPU))
    assert torch.equal(torch.get_rng_state(), before)


# --- what goes wrong


def test_probes_that_diverge_are_told_and_leave_others_alone(caplog):
    vectors = residuals(40, 1, 6, dtype=torch.float32)
    targets = torch.as_tensor(planted(vectors, 0, 0.8))[:, None]
    splits = Splits.of(np.arange(40) % 2, 0)
    training = Training("linear", (0.1, 1.0), 8, 200, Descent("sgd", learning_rate=50.0, patience=300), CPU)
    trained = train(tensors(vectors), targets, splits, training, kept=1)
    assert "6 of 6 probes diverged (linear)" in caplog.text
    assert "lower probe.learning_rate (50)" in caplog.text
    assert np.isfinite(trained.out_of_fold).all()

    caplog.clear()
    train(
        tensors(vectors), targets, splits, Training("linear", (0.1,), 8, 300, Descent(learning_rate=0.05), CPU), kept=1
    )
    assert caplog.text == ""


def test_too_few_epochs_are_told(caplog):
    vectors = residuals(40, 2, 6)
    targets = torch.as_tensor(planted(vectors, 0, 0.8))[:, None]
    splits = Splits.of(np.arange(40) % 2, 0)
    train(tensors(vectors), targets, splits, Training("linear", (0.1,), 8, 2, trainer=CPU), kept=1)
    assert "6 of 6 probes (linear) had not stopped after 2 epochs: raise probe.max_epochs" in caplog.text


def test_a_target_or_feature_that_is_constant_in_training():
    vectors = residuals(30, 1, 4, dtype=torch.float32)
    vectors[:, 0, 2] = 0.1
    targets = np.stack([np.full(30, 4.0), planted(vectors[:, :, :2], 0, 0.9)], axis=1)
    training = Training("linear", (0.1,), 8, 30, Descent(learning_rate=0.05), CPU)
    bank = bank_of(vectors, targets, Splits.of(np.arange(30) % 2, 0), training)
    np.testing.assert_allclose(bank.predict_fit(vectors, 2)[:, 0, 0], 4.0, atol=1e-4)
    assert bank.parts["weight"][..., 2].abs().max() < 1e-3
    assert not bank.diverged.any()


@pytest.mark.parametrize("penalties", [(), (-1.0,), (float("nan"),), (float("inf"),)])
def test_penalties_that_cannot_be_are_refused(penalties):
    with pytest.raises(ValueError, match="penalties"):
        bank_of(residuals(12, 1, 4), np.zeros((12, 1)), Splits.of(np.arange(12) % 2, 0), Training("linear", penalties))


@pytest.mark.slow
def test_two_processes_train_nearly_what_one_does():
    vectors = residuals(80, 1, 6)
    targets = torch.as_tensor(planted(vectors, 0, 0.9))[:, None]
    splits = Splits.of(np.arange(80) % 2, 0)
    descent = Descent(learning_rate=0.02, patience=50)
    one, two = (
        train(tensors(vectors), targets, splits, Training("linear", (0.01,), 32, 40, descent, trainer), kept=1)
        for trainer in (CPU, {"devices": 2, "strategy": "ddp_spawn", "accelerator": "cpu"})
    )
    np.testing.assert_allclose(two.out_of_fold, one.out_of_fold, rtol=0, atol=0.3)


def test_lightnings_loggers_and_callbacks_are_the_users(tmp_path):
    x = residuals(60, 1, 5)
    splits = Splits.of(np.arange(60) % 3, 0)
    seen = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            seen.append(trainer.current_epoch)

    both = {"callbacks": [Watch()], "logger": CSVLogger(tmp_path, name="", version="")}
    settings = Training(kind="linear", penalties=(0.1,), max_epochs=4, trainer=both)
    train(tensors(x), torch.tensor(planted(x, 0, 0.5))[:, None], splits, settings, kept=1)
    assert seen == [0, 1, 2, 3]
    names, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"probe/loss", "probe/validation_loss", "probe/stopped"} <= set(names.split(","))
    assert rows


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"device": 2}, "unexpected keyword"),
        ({"accelerator": "warp"}, "accelerator"),
        ({"precision": "7"}, "7"),
        ({"max_epochs": 3}, "max_epochs"),
    ],
)
def test_what_lightning_refuses_is_one_line(trainer, message):
    x = residuals(20, 1, 3)
    settings = Training(kind="ridge", trainer=trainer)
    with pytest.raises(UserError, match=rf"probe\.trainer: .*{message}") as caught:
        train(tensors(x), torch.zeros(20, 1), Splits.of(np.arange(20) % 2, 0), settings, kept=1)
    assert "\n" not in str(caught.value)


def test_a_strategy_that_begins_the_whole_command_again_is_refused():
    x = residuals(20, 1, 3)
    settings = Training(kind="ridge", trainer={"devices": 2, "strategy": "ddp", "accelerator": "cpu"})
    with pytest.raises(UserError, match=r"probe\.trainer\.strategy: got 'ddp'; allowed"):
        train(tensors(x), torch.zeros(20, 1), Splits.of(np.arange(20) % 2, 0), settings, kept=1)
