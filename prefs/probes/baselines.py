"""What a probe's scores are compared with: predictions from what a reader could know without the activations.

Each gives held-out predictions with the probe's own folds: every task is predicted by a fit to the other folds' tasks
that have a target (y is not NaN). Tasks without a target are predicted too, and where nothing can be trained on the
prediction is NaN. A probe that does no better than one of these has found no more than it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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
# Numbers of one block of sites, standardised: 128 MiB of float32.
BLOCK_ENTRIES = 2**25


def origin_mean(y: ArrayLike, origins: Sequence[str], folds: ArrayLike) -> Floats:
    """Predict each task [n] by the mean of its origin; of all tasks where the other folds have none of its origin.

    A probe that does no better has found which data set a task comes from and nothing else.
    """
    y, folds = _checked(y, folds, origins=origins)
    origin = np.asarray(origins)
    predictions = np.full(len(y), np.nan)
    for training, held_out in _splits(y, folds):
        predictions[held_out] = y[training].mean()
        for name in np.unique(origin[training]):
            predictions[held_out & (origin == name)] = y[training & (origin == name)].mean()
    return predictions


def length(y: ArrayLike, prompts: Sequence[str], completions: Sequence[str], folds: ArrayLike) -> Floats:
    """Predict each task [n] from how long it is: least squares on log(1 + characters) of prompt and of completion."""
    y, folds = _checked(y, folds, prompts=prompts, completions=completions)
    counts = [[len(text) for text in texts] for texts in (prompts, completions)]
    known = np.log1p(np.array(counts, dtype=np.float64).T)
    predictions = np.full(len(y), np.nan)
    for training, held_out in _splits(y, folds):
        predictions[held_out] = LinearRegression().fit(known[training], y[training]).predict(known[held_out])
    return predictions


def content(y: ArrayLike, texts: Sequence[str], folds: ArrayLike, seed: int) -> Floats:
    """Predict each task [n] from its words: ridge regression on TF-IDF of words and pairs of words.

    Frequencies are sublinear, 1 + log(count); vocabulary and document frequencies are the training folds'. The penalty
    is the one of least error within them: leaving each task out, or with more than 2,000 on a fifth that `seed` draws.
    Only the first 10,000 characters of a text are read. Where the training folds have no word, the prediction is their
    mean.
    """
    y, folds = _checked(y, folds, texts=texts)
    predictions = np.full(len(y), np.nan)
    # As TfidfVectorizer, but texts are cut into words once, not once a fold. One-letter words count: digits are some.
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b")
    try:
        counts = sparse.csr_array(vectorizer.fit_transform([text[:MOST_CHARACTERS] for text in texts]))
    except ValueError:  # no text has a word
        counts = sparse.csr_array((len(y), 0))
    for training, held_out in _splits(y, folds):
        known = counts[:, np.unique(counts[training].indices)]
        if known.shape[1] == 0:
            predictions[held_out] = y[training].mean()
            continue
        weigh = TfidfTransformer(sublinear_tf=True).fit(known[training])
        predictions[held_out] = _ridge(sparse.csr_array(weigh.transform(known)), y, training, seed)[held_out]
    return predictions


def embedding(y: ArrayLike, texts: Sequence[str], folds: ArrayLike, model: str) -> Floats:
    """Predict each task [n] from the sentence embedding of its text: `on_vectors` of what `embed` gives."""
    _checked(y, folds, texts=texts)
    return on_vectors(y, embed(texts, model), folds)


def on_vectors(y: ArrayLike, vectors: ArrayLike, folds: ArrayLike) -> Floats:
    """Predict each task [n] by ridge regression on vectors [n, e] of norm 1; the penalty by leaving one out (GCV)."""
    vectors = np.asarray(vectors, dtype=np.float64)
    y, folds = _checked(y, folds, vectors=vectors)
    predictions = np.full(len(y), np.nan)
    for training, held_out in _splits(y, folds):
        predictions[held_out] = _ridge(vectors, y, training)[held_out]
    return predictions


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


def random_directions(
    features: torch.Tensor, y: ArrayLike, folds: ArrayLike, directions: int, seed: int
) -> NDArray[np.float32]:
    """Predict each task from its projection on a random direction: what a probe gets without learning where to look.

    Vectors are standardised by the training tasks' mean and SD; the projection goes through least squares with an
    intercept. Directions are of norm 1, uniform on the sphere, and the same at every site, so that sites may be given
    in groups.

    Parameters
    ----------
    features
        [n, S, d], on any device. Beside them, a few times 128 MiB or one site's float32 vectors are held.
    y, folds
        [n].
    directions
        How many, R.
    seed
        Of the directions.

    Returns
    -------
    numpy.ndarray
        [n, S, R].
    """
    y, folds = _checked(y, folds, features=features)
    n, sites, d = features.shape
    drawn = torch.randn(d, directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    drawn = (drawn / drawn.norm(dim=0)).to(features.device)
    predictions = np.full((n, sites, directions), np.nan, dtype=np.float32)
    size = max(1, BLOCK_ENTRIES // max(1, n * d))
    for start in range(0, sites, size):
        block = features[:, start : start + size].float()
        for training, held_out in _splits(y, folds):
            rows, others = (torch.from_numpy(np.flatnonzero(mask)).to(block.device) for mask in (training, held_out))
            target = torch.from_numpy(y[training]).to(block.device, torch.float32)
            spread, mean = torch.std_mean(block[rows], dim=0, correction=0)
            # A number that is the same in all training tasks has an SD of rounding, which must not be divided by.
            scale = torch.where(spread > 1e-6 * mean.abs(), spread, 1.0)
            seen, unseen = (((block[part] - mean) / scale) @ drawn for part in (rows, others))
            middle = seen.mean(dim=0)
            seen, about = seen - middle, target - target.mean()
            power = seen.square().sum(dim=0)
            slope = torch.where(power > 0, torch.einsum("nsr,n->sr", seen, about) / power, 0.0)
            predicted = target.mean() + slope * (unseen - middle)
            predictions[held_out, start : start + size] = predicted.cpu().numpy()
    return predictions


def _splits(y: Floats, folds: np.ndarray) -> Iterator[tuple[Booleans, Booleans]]:
    """Which tasks train and which are held out, fold by fold, where any can be trained on."""
    observed = np.isfinite(y)
    for fold in np.unique(folds):
        training = observed & (folds != fold)
        if training.any():
            yield training, folds == fold


def _ridge(known: Floats | sparse.csr_array, y: Floats, training: Booleans, seed: int = 0) -> Floats:
    """Predictions of all tasks by a fit to the training ones; their mean where a penalty cannot be chosen."""
    count = int(training.sum())
    if count < 3:
        return np.full(len(y), y[training].mean())
    # Leaving one out has a closed form, but a cubic one where there are more words than tasks.
    large = sparse.issparse(known) and count > MOST_LEFT_OUT
    inner = ShuffleSplit(1, test_size=0.2, random_state=seed) if large else None
    scoring = "neg_mean_squared_error" if large else None
    fitted = RidgeCV(PENALTIES, cv=inner, scoring=scoring).fit(known[training], y[training])
    return fitted.predict(known)


def _checked(
    y: ArrayLike, folds: ArrayLike, **beside: Sequence[str] | np.ndarray | torch.Tensor
) -> tuple[Floats, np.ndarray]:
    """y as float64 and folds, both [n] as what is beside them."""
    y, folds = np.asarray(y, dtype=np.float64), np.asarray(folds)
    counts = {"targets": len(y), "folds": len(folds)} | {name: len(each) for name, each in beside.items()}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"got {got}: give one of each a task")
    return y, folds
