"""What probes are compared with: each baseline against a peer or by hand, and that it sees its training folds only."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import LeaveOneOut
from sklearn.preprocessing import StandardScaler

from prefs.errors import UserError
from prefs.probes import baselines
from prefs.probes.baselines import content, embed, length, on_vectors, origin_mean, random_directions

WORDS = ["sun", "moon", "river", "stone", "bread", "salt", "wind", "leaf"]


def texts_and_targets(n, seed=0):
    """Texts that say "good" or "bad" among other words, and a target that follows."""
    rng = np.random.default_rng(seed)
    good = rng.integers(0, 2, size=n)
    texts = [f"{' '.join(rng.choice(WORDS, 12))} {'good' if yes else 'bad'} {rng.choice(WORDS)}" for yes in good]
    return texts, 3 + good + rng.normal(0, 0.2, size=n), np.arange(n) % 4


def everything(y, folds, texts):
    """Each baseline, by name."""
    return {
        "origin_mean": origin_mean(y, [text[:1] for text in texts], folds),
        "length": length(y, texts, texts[::-1], folds),
        "content": content(y, texts, folds, 0),
        "on_vectors": on_vectors(y, np.eye(len(y)) if len(y) else np.zeros((0, 2)), folds),
        "random": random_directions(torch.eye(len(y)), y, folds, 2, 0)[:, 0],
    }


def test_origin_mean_by_hand():
    y = np.array([1.0, 3.0, 5.0, 7.0, 2.0, np.nan])
    got = origin_mean(y, ["a", "a", "b", "b", "c", "a"], np.array([0, 1, 0, 1, 0, 1]))
    # c has no task in the other fold: the mean of that fold's; the task without a target is predicted all the same.
    np.testing.assert_allclose(got, [3.0, 1.0, 7.0, 5.0, 5.0, 1.0])


@pytest.mark.parametrize("name", ["length", "vectors"])
def test_baselines_of_numbers_are_scikit_learns_on_the_other_folds(name):
    rng = np.random.default_rng(0)
    folds = rng.integers(0, 3, size=60)
    if name == "length":
        prompts, completions = (["x" * size for size in rng.integers(0, 500, size=60)] for _ in range(2))
        known = np.log1p([[len(a), len(b)] for a, b in zip(prompts, completions, strict=True)])
        peer = LinearRegression()
    else:
        known = rng.normal(size=(60, 20)) / np.sqrt(20)
        peer = RidgeCV(baselines.PENALTIES, cv=LeaveOneOut(), scoring="neg_mean_squared_error")
    y = known @ rng.normal(size=known.shape[1]) + rng.normal(0, 0.3, size=60)
    y[7] = np.nan
    got = length(y, prompts, completions, folds) if name == "length" else on_vectors(y, known, folds)
    for fold in range(3):
        rows = (folds != fold) & np.isfinite(y)
        expected = peer.fit(known[rows], y[rows]).predict(known[folds == fold])
        np.testing.assert_allclose(got[folds == fold], expected, atol=1e-9)


def test_content_finds_the_word_that_tells():
    texts, y, folds = texts_and_targets(200)
    got = content(y, texts, folds, 0)
    assert r2_score(y, got) > 0.7
    np.testing.assert_array_equal(got, content(y, texts, folds, 0))
    shuffled = np.random.default_rng(1).permutation(y)
    assert r2_score(shuffled, content(shuffled, texts, folds, 0)) < 0.1


def test_no_baseline_sees_what_it_is_to_predict():
    """Other targets in a fold change no prediction of its own tasks, only those of others."""
    texts, y, folds = texts_and_targets(40)
    before = everything(y, folds, texts)
    for held_out in range(4):
        rows = folds == held_out
        other = np.where(rows, np.random.default_rng(9).normal(50, 30, size=40), y)
        for name, after in everything(other, folds, texts).items():
            np.testing.assert_allclose(after[rows], before[name][rows], atol=1e-9, err_msg=name)
            assert not np.allclose(after[~rows], before[name][~rows], atol=1e-3), name


def test_tasks_without_a_target_are_predicted_and_not_trained_on():
    texts, y, folds = texts_and_targets(40)
    y[::5] = np.nan
    rows = np.isfinite(y)
    full = everything(y, folds, texts)
    assert all(np.isfinite(predictions).all() for predictions in full.values())
    kept = [text for text, keep in zip(texts, rows, strict=True) if keep]
    alone = everything(y[rows], folds[rows], kept)
    for name in ("content", "origin_mean"):
        np.testing.assert_allclose(full[name][rows], alone[name])


def test_where_nothing_can_be_trained_there_is_no_prediction():
    texts, y, folds = texts_and_targets(12)
    y[folds != 2] = np.nan  # only fold 2 has targets, so its own tasks have nothing to train on
    for name, got in everything(y, folds, texts).items():
        np.testing.assert_array_equal(np.isnan(got), folds == 2, err_msg=name)
    for name, got in everything(np.zeros(0), np.zeros(0, dtype=int), []).items():
        assert got.shape == (0,), name


def test_random_directions_are_least_squares_on_a_standardised_projection():
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(40, 12, generator=generator) * torch.logspace(-3, 3, 12) + torch.logspace(2, -2, 12)
    vectors[:, 4] = 7.3  # the same in all tasks
    y = vectors[:, 0].double().numpy() * 1e3 + np.random.default_rng(0).normal(size=40)
    y[6] = np.nan
    folds = np.arange(40) % 4
    got = random_directions(vectors, y, folds, 5, seed=8)
    assert got.shape == (40, 5)
    drawn = torch.randn(12, 5, generator=torch.Generator().manual_seed(8))
    drawn = (drawn / drawn.norm(dim=0)).double().numpy()
    for fold in range(4):
        rows = (folds != fold) & np.isfinite(y)
        x = vectors.double().numpy()
        projected = StandardScaler().fit(x[rows]).transform(x) @ drawn
        for number in range(5):
            line = LinearRegression().fit(projected[rows, number : number + 1], y[rows])
            expected = line.predict(projected[folds == fold, number : number + 1])
            np.testing.assert_allclose(got[folds == fold, number], expected, rtol=1e-3, atol=1e-3)
    assert not np.allclose(random_directions(vectors, y, folds, 5, 2), got, atol=1e-2)
    assert random_directions(vectors, y, folds, 0, 1).shape == (40, 0)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'prefs\[embeddings\]'"):
        embed(["a"], "model")


def test_embeddings_of_a_real_model(tmp_path):
    """A sentence encoder of the embedded model: the mean of its last hidden states."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from prefs.models.embedded import smollm2_folder

    body = Transformer(str(smollm2_folder()), max_seq_length=32, model_kwargs={"dtype": "float32"})
    SentenceTransformer(modules=[body, Pooling(body.model.config.hidden_size, "mean")]).save(str(tmp_path))
    texts, y, folds = texts_and_targets(24)
    vectors = embed([*texts, "", "x" * 3_000_000, "<|im_end|>", "\x00"], str(tmp_path))
    assert (vectors.shape, vectors.dtype) == ((28, 576), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embed(texts[:1], str(tmp_path))[0], vectors[0], atol=1e-4)
    assert np.std(on_vectors(y, vectors[:24], folds)) > 0.01
    assert len(embed([], str(tmp_path))) == 0


def test_a_model_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    monkeypatch.setattr(baselines, "reachable", lambda: False)
    (tmp_path / "config.json").write_text("{}")
    for model in (str(tmp_path), str(tmp_path / "none"), "nobody/nothing-at-all"):
        with pytest.raises(UserError, match=r"^cannot load the embedding model .*: give a folder with one") as caught:
            embed(["a"], model)
        assert "\n" not in str(caught.value)
