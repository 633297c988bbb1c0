"""Probes: the same as scikit-learn's ridge regression, blind to what is held out, and quiet about it."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from contextlib import contextmanager

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from prefs.errors import UserError
from prefs.probes import (
    FittedProbes,
    LinearProbes,
    ProbeData,
    assign_folds,
    evaluate,
    fit_linear,
    load_probe,
    origin_mean_baseline,
    save_probe,
    score,
)
from prefs.probes import fit as fit_module


def residuals(n: int, layers: int, d: int, seed: int = 0) -> torch.Tensor:
    """[n, layers, d] bf16 vectors as the residual stream has them: correlated, off centre, some dimensions huge."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(np.arange(1, d + 1))[:, None]
    x = rng.normal(size=(n, layers, d)) @ mix
    scale = np.where(np.arange(d) < 3, 1000.0, 1.0)
    return torch.tensor((x + 3 * rng.normal(size=d)) * scale).bfloat16()


def ridge(features: torch.Tensor, y: np.ndarray, rows: np.ndarray, layer: int, penalty: float):
    """scikit-learn's probe of one layer, trained on some rows."""
    model = make_pipeline(StandardScaler(), Ridge(alpha=penalty * rows.sum()))
    return model.fit(features[rows, layer].double().numpy(), y[rows])


def train(data: ProbeData, penalty: float) -> LinearProbes:
    probes = LinearProbes(data.moments(), penalty)
    trainer = lightning.Trainer(
        max_epochs=50, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(probes, datamodule=data)
    return probes


# --- folds


@given(
    st.lists(st.tuples(st.text(max_size=4), st.sampled_from("AB")), min_size=6, max_size=40, unique_by=lambda t: t[0]),
    st.integers(2, 6),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_folds_do_not_depend_on_the_order_of_tasks(tasks, folds, seed, shuffler):
    before = assign_folds([key for key, _ in tasks], [origin for _, origin in tasks], folds, seed)
    shuffled = list(tasks)
    shuffler.shuffle(shuffled)
    after = assign_folds([key for key, _ in shuffled], [origin for _, origin in shuffled], folds, seed)
    by_key = dict(zip((key for key, _ in tasks), before, strict=True))
    assert [by_key[key] for key, _ in shuffled] == after.tolist()
    assert set(before) == set(range(folds))


def test_folds_are_stratified_by_origin():
    origins = ["MATH"] * 10 + ["ALPACA"] * 20
    folds = assign_folds([f"t{i}" for i in range(30)], origins, 5, seed=0)
    for fold in range(5):
        assert Counter(origins[i] for i in np.flatnonzero(folds == fold)) == {"MATH": 2, "ALPACA": 4}
    assert folds.tolist() != assign_folds([f"t{i}" for i in range(30)], origins, 5, seed=1).tolist()


def test_rare_origin_falls_back_to_plain_folds_and_says_so(caplog):
    folds = assign_folds([f"t{i}" for i in range(12)], ["MATH"] * 2 + ["ALPACA"] * 10, 4, seed=0)
    assert Counter(folds.tolist()) == dict.fromkeys(range(4), 3)
    assert "MATH has 2 tasks, fewer than 4 folds" in caplog.text


def test_rows_of_one_task_share_a_fold():
    keys = [f"t{i // 3}" for i in range(30)]
    folds = assign_folds(keys, ["A"] * 30, 5, seed=0)
    assert len({(key, fold) for key, fold in zip(keys, folds, strict=True)}) == 10


@pytest.mark.parametrize(
    ("keys", "origins", "folds", "message"),
    [
        (["a", "b", "c"], ["A"] * 3, 4, "3 tasks cannot fill 4 folds"),
        (["a", "b", "c"], ["A"] * 3, 1, "folds=1"),
        (["a", "b", "c"], ["A"] * 2, 2, "every task needs one origin"),
        (["a", "a", "c"], ["A", "B", "A"], 2, "task 'a' has two origins"),
    ],
)
def test_impossible_folds_are_refused_in_one_line(keys, origins, folds, message):
    with pytest.raises(ValueError, match=message) as caught:
        assign_folds(keys, origins, folds, seed=0)
    assert "\n" not in str(caught.value)


# --- training


@pytest.mark.parametrize(("n", "d"), [(150, 20), (40, 120)])
@pytest.mark.parametrize("penalty", [0.03, 1.0, 10.0])
def test_agrees_with_scikit_learn_ridge(n, d, penalty):
    rng = np.random.default_rng(1)
    features = residuals(n, 2, d)
    targets = rng.normal(size=(n, 2)) + features[:, 1, :2].double().numpy() / 1000
    targets[rng.choice(n, size=5, replace=False), 1] = np.nan  # left out for the second target only
    folds = np.arange(n) % 4
    fitted = fit_linear(features, targets, folds, penalty=penalty)
    assert fitted.converged
    assert fitted.weight.shape == (2, 2, d)
    assert fitted.out_of_fold.shape == (2, 2, n)

    for t in range(2):
        observed = np.isfinite(targets[:, t])
        close = 1e-3 * targets[observed, t].std()
        for layer in range(2):
            x = features[:, layer]
            for fold in range(4):
                peer = ridge(features, targets[:, t], observed & (folds != fold), layer, penalty)
                held_out = folds == fold
                expected = peer.predict(x[held_out].double().numpy())
                np.testing.assert_allclose(fitted.out_of_fold[t, layer, held_out], expected, rtol=0, atol=close)
            peer = ridge(features, targets[:, t], observed, layer, penalty)
            predicted = x.float() @ fitted.weight[t, layer] + fitted.bias[t, layer]
            np.testing.assert_allclose(predicted, peer.predict(x.double().numpy()), rtol=0, atol=close)
            # Weights, in units of what one SD of their feature does to the rating.
            scaler, regression = peer[0], peer[1]
            np.testing.assert_allclose(fitted.weight[t, layer] * scaler.scale_, regression.coef_, rtol=0, atol=close)


def test_without_penalty_reaches_least_norm():
    features = residuals(30, 1, 60)
    y = np.random.default_rng(2).normal(size=30)
    fitted = fit_linear(features, y[:, None], np.arange(30) % 3, penalty=0.0)
    assert fitted.converged
    scaler = StandardScaler()
    z = scaler.fit_transform(features[:, 0].double().numpy())
    least = np.linalg.lstsq(z, y - y.mean(), rcond=None)[0]
    np.testing.assert_allclose(fitted.weight[0, 0] * scaler.scale_, least, rtol=0, atol=1e-3)


def test_held_out_tasks_never_touch_their_fit():
    features = residuals(40, 2, 60).float()
    targets = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    folds = torch.arange(40) % 4
    before, _ = train(ProbeData(features, targets, folds), 0.1).raw()

    changed, others = features.clone(), targets.clone()
    changed[folds == 2] = 1e6 * torch.randn_like(changed[folds == 2])
    others[folds == 2] += 100
    others[6, 0] = float("nan")  # a held-out task of fold 2
    after, _ = train(ProbeData(changed, others, folds), 0.1).raw()

    torch.testing.assert_close(after[:, :, 2], before[:, :, 2], rtol=0, atol=1e-12)
    for fit in (0, 1, 3, 4):
        assert (after[:, :, fit] - before[:, :, fit]).abs().max() > 1e-3


def test_planted_signal_is_found_at_its_layer():
    rng = np.random.default_rng(3)
    n, layers, d = 600, 4, 24
    features = residuals(n, layers, d, seed=3)
    direction = rng.normal(size=d)
    z = StandardScaler().fit_transform(features[:, 2].double().numpy()) @ direction
    # Layers of `residuals` are independent, so no other layer knows; the noise leaves a ceiling of .8.
    y = z / z.std() * np.sqrt(0.8) + rng.normal(size=n) * np.sqrt(0.2)
    folds = assign_folds([str(i) for i in range(n)], ["A"] * n, 5, seed=0)
    fitted = fit_linear(features, y[:, None], folds, penalty=1e-3)
    r2 = [s.scores.r2.value for s in evaluate(fitted.out_of_fold, y[:, None], folds, names=["y"], layers=range(layers))]
    assert r2[2] == pytest.approx(0.8, abs=0.05)
    assert max(r2[:2] + r2[3:]) < 0.05


def test_noise_is_not_predicted():
    rng = np.random.default_rng(4)
    y = rng.normal(size=(100, 2))
    folds = np.arange(100) % 5
    fitted = fit_linear(residuals(100, 3, 40), y, folds, penalty=1.0)
    for probe in evaluate(fitted.out_of_fold, y, folds, names=["a", "b"], layers=[0, 5, 9]):
        assert probe.scores.r2.value is not None
        assert probe.scores.r2.value < 0.05


def test_constant_target_and_constant_feature():
    features = residuals(30, 2, 8)
    features[:, :, 4] = 0.1
    targets = np.stack([np.full(30, 4.0), np.random.default_rng(5).normal(size=30), np.full(30, np.nan)], axis=1)
    folds = np.arange(30) % 3
    fitted = fit_linear(features, targets, folds, penalty=1.0)
    assert fitted.converged
    np.testing.assert_allclose(fitted.out_of_fold[0], 4.0)
    np.testing.assert_allclose(fitted.weight[1, :, 4], 0.0, atol=1e-9)
    constant, _, varied, _, absent, _ = evaluate(
        fitted.out_of_fold, targets, folds, names=["constant", "varied", "absent"], layers=[3, 7]
    )
    assert (constant.target, constant.layer) == ("constant", 3)
    assert constant.scores.r2.value is None
    assert constant.scores.r2.reason == "the target is constant"
    assert constant.scores.r2.n == 30
    assert constant.scores.mae.value == pytest.approx(0.0)
    assert varied.scores.r2.value is not None
    assert absent.scores.mae.reason == absent.scores.r2.reason == "fewer than 3 tasks (0)"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_feature_is_named(bad):
    features = residuals(12, 4, 8)
    features[7, 2, 5] = bad
    with pytest.raises(ValueError, match="row 7, layer index 2"):
        fit_linear(features, np.zeros((12, 1)), np.arange(12) % 3, penalty=1.0)


@pytest.mark.parametrize(
    ("targets", "folds", "penalty", "message"),
    [
        (np.zeros(12), np.arange(12) % 3, 1.0, "targets must be"),
        (np.zeros((11, 1)), np.arange(12) % 3, 1.0, "targets must be"),
        (np.full((12, 1), np.inf), np.arange(12) % 3, 1.0, "target index 0 of row 0 is infinite"),
        (np.zeros((12, 1)), np.zeros(12, dtype=int), 1.0, "2 or more"),
        (np.zeros((12, 1)), np.arange(12) % 3 * 2, 1.0, "numbered 0, 1"),
        (np.zeros((12, 1)), np.arange(12) / 2, 1.0, "folds must be"),
        (np.zeros((12, 1)), np.arange(12) % 3, -1.0, "penalty=-1.0"),
        (np.zeros((12, 1)), np.arange(12) % 3, float("nan"), "penalty=nan"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(targets, folds, penalty, message):
    with pytest.raises(ValueError, match=message):
        fit_linear(residuals(12, 2, 8), targets, folds, penalty=penalty)


def test_too_few_epochs_is_told(caplog):
    y = np.random.default_rng(6).normal(size=(60, 1))
    fitted = fit_linear(residuals(60, 1, 200), y, np.arange(60) % 3, penalty=1e-6, max_epochs=1)
    assert not fitted.converged
    assert "max_epochs=1" in caplog.text


def test_layers_in_groups_are_the_same_probes(monkeypatch):
    features, y, folds = residuals(30, 5, 8), np.random.default_rng(7).normal(size=(30, 2)), np.arange(30) % 3
    whole = fit_linear(features, y, folds, penalty=1.0)
    monkeypatch.setattr(fit_module, "GROUP_NUMBERS", 2 * 30 * 8)
    groups = fit_linear(features, y, folds, penalty=1.0)
    torch.testing.assert_close(groups.weight, whole.weight)
    torch.testing.assert_close(groups.bias, whole.bias)
    np.testing.assert_allclose(groups.out_of_fold, whole.out_of_fold)


def test_training_leaves_no_trace(tmp_path, monkeypatch, capfd, caplog, recwarn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # inside a larger Slurm job, one process still trains alone
    monkeypatch.setenv("SLURM_JOB_NAME", "sweep")
    caplog.set_level(logging.DEBUG)
    levels = [logging.getLogger(name).level for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()

    y = np.random.default_rng(8).normal(size=(20, 1))
    y.setflags(write=False)  # as pandas gives it
    first = fit_linear(residuals(20, 2, 8), y, np.arange(20) % 3, penalty=1.0, seed=1)
    torch.rand(1)
    second = fit_linear(residuals(20, 2, 8), y, np.arange(20) % 3, penalty=1.0, seed=1)
    torch.set_rng_state(states[0])
    fit_linear(residuals(20, 2, 8), y, np.arange(20) % 3, penalty=1.0, seed=2)

    assert torch.equal(first.weight, second.weight)
    assert np.array_equal(first.out_of_fold, second.out_of_fold)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert [logging.getLogger(name).level for name in ("lightning", "lightning.pytorch", "lightning.fabric")] == levels
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.startswith("lightning")] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_logger_gets_the_metrics(tmp_path):
    y = np.random.default_rng(9).normal(size=(20, 1))
    logger = CSVLogger(tmp_path, name="", version="")
    fit_linear(residuals(20, 2, 8), y, np.arange(20) % 3, penalty=1.0, logger=logger)
    names, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"probe/objective", "probe/converged"} <= set(names.split(","))
    assert rows


def test_progress_bar_runs_to_its_end(monkeypatch):
    bars: list[tuple[str, int]] = []
    advances: list[int] = []

    @contextmanager
    def bar(what: str, total: int):
        bars.append((what, total))
        yield advances.append

    monkeypatch.setattr(fit_module, "progress", bar)
    y = np.random.default_rng(9).normal(size=(20, 1))
    fit_linear(residuals(20, 2, 8), y, np.arange(20) % 3, penalty=1.0)
    assert bars == []
    fit_linear(residuals(20, 2, 8), y, np.arange(20) % 3, penalty=1.0, show_progress=True)
    assert bars == [("training 8 probes", 8)]
    assert sum(advances) == 8


# --- evaluation


def test_scores_agree_with_peers():
    rng = np.random.default_rng(10)
    y, folds = rng.normal(size=50), np.arange(50) % 5
    predictions = y + rng.normal(size=50)
    y[3], predictions[4] = np.nan, np.nan
    kept = np.delete(np.arange(50), [3, 4])
    scores = score(predictions, y, folds)
    p, t, f = predictions[kept], y[kept], folds[kept]
    assert scores.r2.value == pytest.approx(1 - ((t - p) ** 2).sum() / ((t - t.mean()) ** 2).sum())
    assert scores.pearson.value == pytest.approx(np.corrcoef(t, p)[0, 1])
    assert scores.spearman.value == pytest.approx(np.corrcoef(stats.rankdata(t), stats.rankdata(p))[0, 1])
    assert scores.mae.value == pytest.approx(np.abs(t - p).mean())
    assert scores.r2_fold_sd.value == pytest.approx(np.std([r2_score(t[f == k], p[f == k]) for k in range(5)], ddof=1))
    assert (scores.r2.n, scores.r2_fold_sd.n) == (48, 5)


def test_constant_prediction_has_an_r2_but_no_correlation():
    scores = score(np.full(6, 2.0), np.array([1.0, 2, 3, 1, 2, 3]), np.array([0, 0, 0, 1, 1, 1]))
    assert scores.r2.value == pytest.approx(0.0)
    assert scores.pearson.reason == scores.spearman.reason == "the prediction is constant"


def test_two_tasks_score_nothing():
    scores = score(np.array([1.0, 2]), np.array([1.0, 2]), np.array([0, 1]))
    assert {scores.r2.reason, scores.pearson.reason, scores.mae.reason} == {"fewer than 3 tasks (2)"}


def test_folds_too_small_for_a_spread():
    y = np.array([1.0, 2, 3, 4])
    scores = score(y + 0.1, y, np.array([0, 0, 1, 1]))
    assert scores.r2.value == pytest.approx(1 - 0.04 / 5)
    assert scores.r2_fold_sd.value is None


def test_origin_baseline_by_hand():
    y = np.array([1.0, 3.0, 5.0, np.nan, 9.0, 2.0])
    baseline = origin_mean_baseline(y, ["A", "A", "B", "B", "B", "C"], np.array([0, 1, 0, 1, 1, 0]))
    # Fold 0 learns from A: 3 and B: 9, and has never seen C: their mean, 6. Fold 1 learns from A: 1, B: 5 and C: 2.
    np.testing.assert_allclose(baseline.predictions, [3, 1, 9, 5, 5, 6])
    assert baseline.r2.n == 5
    assert baseline.r2.value == pytest.approx(1 - (4 + 4 + 16 + 16 + 16) / 40)


def test_origin_baseline_never_sees_the_held_out_fold():
    rng = np.random.default_rng(11)
    y, folds, origins = rng.normal(size=30), np.arange(30) % 3, list(rng.choice(["A", "B"], size=30))
    before = origin_mean_baseline(y, origins, folds).predictions
    y[folds == 1] += 100
    np.testing.assert_array_equal(origin_mean_baseline(y, origins, folds).predictions[folds == 1], before[folds == 1])


def test_origin_baseline_of_a_constant_target_is_missing():
    assert origin_mean_baseline(np.full(6, 4.0), ["A"] * 6, np.arange(6) % 2).r2.reason == "the target is constant"
    assert origin_mean_baseline(np.full(6, np.nan), ["A"] * 6, np.arange(6) % 2).r2.value is None


def test_evaluate_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="1 targets, 2 layers and 6 tasks do not fit"):
        evaluate(np.zeros((1, 3, 6)), np.zeros((6, 1)), np.arange(6) % 2, names=["y"], layers=[0, 1])


# --- the card


@pytest.fixture
def fitted() -> FittedProbes:
    y = np.random.default_rng(12).normal(size=(20, 2))
    return fit_linear(residuals(20, 3, 8), y, np.arange(20) % 3, penalty=1.0)


def test_card_round_trip(tmp_path, fitted):
    metadata = {"model": "smollm2", "penalty": 1.0, "note": "é"}
    where = {"targets": ["exact", "sampled"], "layers": [0, 4, 8]}
    save_probe(tmp_path / "probe", fitted.weight, fitted.bias, metadata=metadata, **where)
    probe = load_probe(tmp_path / "probe")
    assert torch.equal(probe.weight, fitted.weight)
    assert torch.equal(probe.bias, fitted.bias)
    assert (probe.targets, probe.layers, probe.d_model, probe.metadata) == (
        ("exact", "sampled"),
        (0, 4, 8),
        8,
        metadata,
    )
    assert sorted(path.name for path in (tmp_path / "probe").iterdir()) == ["probe.json", "probe.safetensors"]


def test_card_that_cannot_be_right_is_not_written(tmp_path, fitted):
    with pytest.raises(ValueError, match=r"need weight \[2, 2, 8\]"):
        save_probe(tmp_path, fitted.weight, fitted.bias, targets=["a", "b"], layers=[0, 4], metadata={})
    with pytest.raises(ValueError, match="JSON"):
        save_probe(tmp_path, fitted.weight, fitted.bias, targets=["a", "b"], layers=[0, 4, 8], metadata={"r2": np.nan})
    assert list(tmp_path.iterdir()) == []


def test_damaged_card_is_named(tmp_path, fitted):
    def saved() -> None:
        save_probe(tmp_path, fitted.weight, fitted.bias, targets=["a", "b"], layers=[0, 4, 8], metadata={})

    with pytest.raises(UserError, match=r"probe\.safetensors is missing"):
        load_probe(tmp_path)

    saved()
    card = json.loads((tmp_path / "probe.json").read_text())
    (tmp_path / "probe.json").write_text(json.dumps({**card, "layers": [0, 4]}))
    with pytest.raises(UserError, match=r"need weight \[2, 2, 8\].*got weight \[2, 3, 8\]"):
        load_probe(tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps({**card, "d_model": 9}))
    with pytest.raises(UserError, match="d_model=9"):
        load_probe(tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps({"layers": [0]}))
    with pytest.raises(UserError, match="has no targets"):
        load_probe(tmp_path)
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_probe(tmp_path)

    saved()
    content = bytearray((tmp_path / "probe.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "probe.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"probe\.safetensors is damaged"):
        load_probe(tmp_path)
