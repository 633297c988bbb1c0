"""What a probe's scores are compared with: predictions from what a reader could know without the activations.

Each gives held-out predictions with the probe's own folds: every task is predicted by a fit to the other folds' tasks
that have a target (y is not NaN). Tasks without a target are predicted too, and where nothing can be trained on the
prediction is NaN. A probe that does no better than one of these has found no more than it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.model_selection import ShuffleSplit
from sklearn.preprocessing import normalize

from prefs.data.hub import reachable
from prefs.errors import UserError
from prefs.statistics.estimates import Floats

Booleans = NDArray[np.bool_]

# What a text is about stands in its beginning, and one of megabytes would take minutes.
MOST_CHARACTERS = 10_000
# Penalties to choose from, where every text's vector has norm 1.
PENALTIES = np.logspace(-3, 3, 7)
# Training tasks up to which the penalty of words is chosen by leaving each out.
MOST_LEFT_OUT = 2_000


def origin_mean(y: ArrayLike, origins: Sequence[str], folds: ArrayLike) -> Floats:
    """Predict each task [n] by the mean of its origin; of all tasks where the other folds have none of its origin.

    A probe that does no better has found which data set a task comes from and nothing else.
    """
    y, origin = np.asarray(y, dtype=np.float64), np.asarray(origins)

    def fitted(training: Booleans) -> Floats:
        predictions = np.full(len(y), y[training].mean())
        for name in np.unique(origin[training]):
            predictions[origin == name] = y[training & (origin == name)].mean()
        return predictions

    return _held_out(y, folds, origin, fitted)


def length(y: ArrayLike, prompts: Sequence[str], completions: Sequence[str], folds: ArrayLike) -> Floats:
    """Predict each task [n] from how long it is: least squares on log(1 + characters) of prompt and of completion."""
    y = np.asarray(y, dtype=np.float64)
    lengths = [(len(prompt), len(text)) for prompt, text in zip(prompts, completions, strict=True)]
    known = np.log1p(np.array(lengths, dtype=np.float64).reshape(-1, 2))
    return _held_out(y, folds, known, lambda rows: LinearRegression().fit(known[rows], y[rows]).predict(known))


def content(y: ArrayLike, texts: Sequence[str], folds: ArrayLike, seed: int) -> Floats:
    """Predict each task [n] from its words: ridge regression on TF-IDF of words and pairs of words.

    Frequencies are sublinear, 1 + log(count); vocabulary and document frequencies are the training folds'. The penalty
    is the one of least error within them: leaving each task out, or with more than 2,000 on a fifth that `seed` draws.
    Only the first 10,000 characters of a text are read. Where the training folds have no word, the prediction is their
    mean.
    """
    y = np.asarray(y, dtype=np.float64)
    # As TfidfVectorizer, but texts are cut into words once, not once a fold. One-letter words count: digits are some.
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b")
    try:
        counts = sparse.csr_array(vectorizer.fit_transform([text[:MOST_CHARACTERS] for text in texts]))
    except ValueError:  # no text has a word
        counts = sparse.csr_array((len(texts), 0))

    def fitted(training: Booleans) -> Floats:
        known = counts[:, np.unique(counts[training].indices)]
        if known.shape[1] == 0:
            return np.full(len(y), y[training].mean())
        weigh = TfidfTransformer(sublinear_tf=True).fit(known[training])
        return _ridge(sparse.csr_array(weigh.transform(known)), y, training, seed)

    return _held_out(y, folds, texts, fitted)


def on_vectors(y: ArrayLike, vectors: ArrayLike, folds: ArrayLike) -> Floats:
    """Predict each task [n] by ridge regression on vectors [n, e] of norm 1; the penalty by leaving one out (GCV)."""
    y, vectors = np.asarray(y, dtype=np.float64), np.asarray(vectors, dtype=np.float64)
    return _held_out(y, folds, vectors, lambda training: _ridge(vectors, y, training))


def embed(texts: Sequence[str], model: str) -> NDArray[np.float32]:
    """Sentence embeddings [n, e] of norm 1, of the first 10,000 characters of each text.

    Parameters
    ----------
    texts
        n texts.
    model
        A folder with a model for the package sentence-transformers, or its name on the hub.

    Raises
    ------
    UserError
        If the package is not installed, or the model is not there or cannot be read.
    """
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if error.name != "sentence_transformers":
            raise
        raise UserError(
            "sentence embeddings need the package sentence-transformers: pip install 'prefs[embeddings]', or leave"
            " out the model of embeddings"
        ) from None
    local = Path(model).exists() or not reachable()  # out of reach, the library would retry for minutes
    try:
        encoder = SentenceTransformer(model, trust_remote_code=False, local_files_only=local)
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot load the embedding model {model!r} ({why}): give a folder with one, or the hub's name of one that"
            " can be downloaded or is in the cache"
        ) from None
    if not texts:
        return np.zeros((0, 0), dtype=np.float32)
    # An empty text has no token, and nothing to embed.
    encoded = encoder.encode([text[:MOST_CHARACTERS] or " " for text in texts], show_progress_bar=sys.stderr.isatty())
    # The library would normalise in the model's own precision.
    return np.asarray(normalize(np.asarray(encoded, dtype=np.float32)), dtype=np.float32)


def random_directions(vectors: torch.Tensor, y: ArrayLike, folds: ArrayLike, directions: int, seed: int) -> Floats:
    """Predict each task from its projection on a random direction: what a probe gets without learning where to look.

    Vectors [n, d] are standardised by the training tasks' mean and SD; the projection goes through least squares with
    an intercept. Directions are of norm 1, uniform on the sphere, drawn by the seed: as many as are asked for, R.
    Returns [n, R].
    """
    y, vectors = np.asarray(y, dtype=np.float64), vectors.float()
    drawn = torch.randn(
        vectors.shape[1], directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    drawn /= drawn.norm(dim=0)

    def fitted(training: Booleans) -> Floats:
        rows, target = torch.from_numpy(np.flatnonzero(training)), torch.from_numpy(y[training]).float()
        spread, mean = torch.std_mean(vectors[rows], dim=0, correction=0)
        # A number that is the same in all training tasks has an SD of rounding, which must not be divided by.
        scale = torch.where(spread > 1e-6 * mean.abs(), spread, 1.0)
        projections = ((vectors - mean) / scale) @ drawn
        away = projections - projections[rows].mean(dim=0)
        power = away[rows].square().sum(dim=0)
        slope = torch.where(power > 0, (target - target.mean()) @ away[rows] / power, 0.0)
        return (target.mean() + slope * away).double().numpy()

    return _held_out(y, folds, vectors, fitted, (directions,))


def _held_out(
    y: Floats,
    folds: ArrayLike,
    known: Sequence[str] | np.ndarray | torch.Tensor,
    fitted: Callable[[Booleans], Floats],
    shape: tuple[int, ...] = (),
) -> Floats:
    """[n, *shape]: each fold's tasks as predicted by a fit to the others that have a target, NaN where there is none.

    ``fitted`` gives predictions of all tasks by a fit to some.

    Raises
    ------
    ValueError
        If targets, folds and what is known are not of as many tasks.
    """
    folds = np.asarray(folds)
    if not len(y) == len(folds) == len(known):
        got = f"{len(y)} targets, {len(folds)} folds, {len(known)} to predict from"
        raise ValueError(f"got {got}: give one of each a task")
    predictions = np.full((len(y), *shape), np.nan)
    for fold in np.unique(folds):
        training = np.isfinite(y) & (folds != fold)
        if training.any():
            predictions[folds == fold] = fitted(training)[folds == fold]
    return predictions


def _ridge(known: Floats | sparse.csr_array, y: Floats, training: Booleans, seed: int = 0) -> Floats:
    """Predictions of all tasks by a fit to the training ones; their mean where a penalty cannot be chosen."""
    count = int(training.sum())
    if count < 3:
        return np.full(len(y), y[training].mean())
    # Leaving one out has a closed form, but a cubic one where there are more words than tasks.
    large = sparse.issparse(known) and count > MOST_LEFT_OUT
    inner = ShuffleSplit(1, test_size=0.2, random_state=seed) if large else None
    scoring = "neg_mean_squared_error" if large else None
    return RidgeCV(PENALTIES, cv=inner, scoring=scoring).fit(known[training], y[training]).predict(known)
