"""How fast probes are trained, and in how much memory.

    python benchmarks/probes.py ridge     all layers, folds and penalties at once, against loops over scikit-learn
    python benchmarks/probes.py linear    AdamW on all layers and folds at once, against one Lightning fit for each
    python benchmarks/probes.py stream    20,000 tasks of width 4,608 from the store: seconds a layer and peak memory

Each prints a Markdown table. Random vectors stand for captured ones: correlated, off centre, some dimensions huge.
"""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import lightning
import numpy as np
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, TensorDataset

from prefs.config import ProbeConfig, ProbeControlsConfig
from prefs.probes.crossval import cross_validate
from prefs.probes.features import Captured, Tensors
from prefs.probes.folds import Splits
from prefs.probes.probe import Site
from prefs.probes.targets import Target
from prefs.probes.train import Trained, train
from prefs.stages.records import Residuals
from prefs.statistics.estimates import Estimate
from prefs.store.table import Store

PENALTIES = np.logspace(-4, 4, 17).tolist()
RIDGE = ProbeConfig(
    "ridge", penalties=PENALTIES, controls=ProbeControlsConfig(permutations=0), _target_="prefs.probes.ridge.RidgeBank"
)
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def vectors(n: int, layers: int, d: int, rng: np.random.Generator) -> torch.Tensor:
    """[n, layers, d] bfloat16."""
    mix = (rng.normal(size=(d, d)) / np.sqrt(np.arange(1, d + 1))[:, None]).astype(np.float32)
    scale = np.where(np.arange(d) < 3, 1000.0, 1.0).astype(np.float32)
    made = [(rng.normal(size=(n, d)).astype(np.float32) @ mix + 3) * scale for _ in range(layers)]
    return torch.from_numpy(np.stack(made, axis=1)).bfloat16()


def rating(x: torch.Tensor, rng: np.random.Generator) -> np.ndarray:
    """[n] something that the middle layer knows half of."""
    z = StandardScaler().fit_transform(x[:, x.shape[1] // 2].float().numpy())
    signal = z @ rng.normal(size=z.shape[1])
    return signal / signal.std() + rng.normal(size=len(z))


def timed(clock: str, repeats: int, run: Callable[[], object]) -> tuple[float, list[float]]:
    """Median seconds, and all."""
    taken = []
    for _ in range(repeats):
        begun = CLOCKS[clock]()
        run()
        taken.append(CLOCKS[clock]() - begun)
    return statistics.median(taken), taken


def trainer(**arguments: object) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


def ridge(given: argparse.Namespace) -> None:
    """Out-of-fold predictions of every layer and fold, of the penalty chosen among all."""
    rng = np.random.default_rng(0)
    n, layers, d, k = given.tasks, given.layers, given.width, 5
    x = vectors(n, layers, d, rng)
    y = rating(x, rng)
    folds = np.arange(n) % k
    features = Tensors(x, [Site(layer, "rating") for layer in range(layers)])
    splits = Splits.draw(folds, 0)
    wide = [x[:, layer].float().numpy() for layer in range(layers)]

    def at_once() -> Trained:
        return train(features, torch.from_numpy(y)[:, None], splits, RIDGE, kept=1)

    def loop(dtype: type) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            out = np.empty((layers, len(PENALTIES), n))
            for layer in range(layers):
                for fold in range(k):
                    training, held_out = folds != fold, folds == fold
                    scaler = StandardScaler().fit(wide[layer][training].astype(dtype))
                    seen, unseen = (scaler.transform(wide[layer][rows].astype(dtype)) for rows in (training, held_out))
                    for at, penalty in enumerate(PENALTIES):
                        model = Ridge(alpha=penalty * training.sum()).fit(seen, y[training].astype(dtype))
                        out[layer, at, held_out] = model.predict(unseen)
            return out

        return run

    def nested(inner: int, count: int) -> Callable[[], None]:
        def run() -> None:
            alphas = [penalty * n * (k - 1) / k for penalty in PENALTIES]
            for layer in range(count):
                pipe = make_pipeline(StandardScaler(), RidgeCV(alphas, cv=inner or None))
                cross_val_score(pipe, wide[layer], y, cv=PredefinedSplit(folds), scoring="r2")

        return run

    few = min(given.nested_layers, layers)
    rows = [
        ("prefs, all at once, penalty chosen within the training folds", timed(given.clock, given.repeats, at_once), 1),
        ("scikit-learn, a loop over Ridge, float64", timed(given.clock, 1, loop(np.float64)), 1),
        ("scikit-learn, a loop over Ridge, float32", timed(given.clock, 1, loop(np.float32)), 1),
        ("scikit-learn, RidgeCV (5 folds) in cross_val_score", timed(given.clock, 1, nested(5, few)), layers / few),
        ("scikit-learn, RidgeCV (its own) in cross_val_score", timed(given.clock, 1, nested(0, few)), layers / few),
    ]  # fmt: skip
    print(f"{layers} layers x {n:,} tasks x {d}, {k} folds x {len(PENALTIES)} penalties, {given.clock} time;")
    print(f"RidgeCV on {few} layers, scaled to {layers}\n")
    print("| method | s | ratio to prefs |\n|---|---|---|")
    for name, (median, _), times in rows:
        seconds = median * times
        print(f"| {name} | {seconds:.1f} | {seconds / rows[0][1][0]:.1f} |")
    trained, every = at_once(), loop(np.float64)()
    chosen = np.searchsorted(PENALTIES, trained.penalty[folds, :, 0])  # [n, layers]
    expected = every[np.arange(layers), chosen, np.arange(n)[:, None]]
    difference = np.abs(trained.out_of_fold[:, :, 0] - expected).max() / y.std()
    print(f"\nLargest difference of predictions from float64's: {difference:.1e} of the target's SD")


class OneProbe(lightning.LightningModule):
    """What a user would write for one layer and fold."""

    def __init__(self, d: int, rate: float):
        super().__init__()
        self.probe = torch.nn.Linear(d, 1)
        self.rate = rate

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.mse_loss(self.probe(x)[:, 0], y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.01)


def linear(given: argparse.Namespace) -> None:
    """The same number of epochs of AdamW for every layer and fold."""
    rng = np.random.default_rng(0)
    n, layers, d, epochs = given.tasks, given.layers, given.width, given.epochs
    x = vectors(n, layers, d, rng)
    y = rating(x, rng)
    splits = Splits.draw(np.arange(n) % 5, 0)
    features = Tensors(x, [Site(layer, "rating") for layer in range(layers)])
    settings = ProbeConfig(
        "linear", kind="linear", penalties=[0.01], max_epochs=epochs, patience=epochs + 1,
        _target_="prefs.probes.descent.LinearBank",
    )  # fmt: skip

    def at_once() -> None:
        train(features, torch.from_numpy(y)[:, None], splits, settings, kept=1)

    def one_by_one() -> None:
        for layer in range(given.nested_layers):
            for fit in range(splits.fits):
                rows = splits.training(fit) & ~splits.validation
                scaler = StandardScaler().fit(x[rows, layer].float().numpy())
                seen = torch.from_numpy(scaler.transform(x[rows, layer].float().numpy()))
                wanted = torch.from_numpy((y[rows] - y[rows].mean()) / y[rows].std()).float()
                loader = DataLoader(TensorDataset(seen, wanted), batch_size=64, shuffle=True)
                trainer(max_epochs=epochs).fit(OneProbe(d, 1e-3), loader)

    once, _ = timed(given.clock, given.repeats, at_once)
    single, _ = timed(given.clock, 1, one_by_one)
    single *= layers / given.nested_layers
    print(f"AdamW, {layers} layers x {n:,} tasks x {d}, 5 folds and all, {epochs} epochs of 64, {given.clock} time;")
    print(f"one by one on {given.nested_layers} layers, scaled to {layers}\n\n| method | s | ratio |\n|---|---|---|")
    print(f"| prefs, all layers and folds at once, validated each epoch | {once:.1f} | 1 |")
    print(f"| one Lightning fit a layer and fold, not validated | {single:.1f} | {single / once:.1f} |")


def stream(given: argparse.Namespace) -> None:
    """Cross-validated ridge on vectors in the store's shards."""
    rng = np.random.default_rng(0)
    n, layers, d = given.tasks, given.layers, given.width
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        store = Store.open(folder)
        shards = store.vectors("residuals", {"benchmark": True})
        keys = [shards.key(task=task) for task in range(n)]
        direction = rng.normal(size=d).astype(np.float32) / np.sqrt(d)
        y = np.empty(n)
        for start in range(0, n, 1000):
            rows = slice(start, min(start + 1000, n))
            made = rng.normal(size=(rows.stop - start, layers, d)).astype(np.float32)
            y[rows] = made[:, 0] @ direction + rng.normal(size=len(made))
            shards.append(keys[rows], list(range(layers)), torch.from_numpy(made).bfloat16(), [])
        shards.refresh()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        features = Captured([Residuals("rating", tuple(range(layers)), keys, shards)], list(range(n)))
        target = Target("exact", "exact", y, Estimate(1.0, None, None, n))
        begun = time.perf_counter()
        (found,) = cross_validate(
            features,
            [target],
            np.arange(n) % 5,
            ["ONE"] * n,
            RIDGE,
            bootstrap=0,
        )
        taken = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{n:,} tasks x {layers} layers x {d} in bfloat16 on disk, 5 folds x {len(PENALTIES)} penalties\n")
    print("| s a layer | peak memory before (GiB) | peak memory (GiB) | R² by layer |\n|---|---|---|---|")
    scores = ", ".join(f"{each.r2.value:.2f}" for each in found.by_site)
    print(f"| {taken / layers:.0f} | {before:.1f} | {peak:.1f} | {scores} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ridge", "linear", "stream"))
    parser.add_argument("--tasks", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--nested-layers", type=int, default=2, help="layers of the slowest peers")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--folder", help="where `stream` puts its shards")
    given = parser.parse_args()
    sizes = {"stream": (20_000, 2, 4608)}.get(given.what, (1000, 30, 576))
    for name, size in zip(("tasks", "layers", "width"), sizes, strict=True):
        if getattr(given, name) is None:
            setattr(given, name, size)
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    {"ridge": ridge, "linear": linear, "stream": stream}[given.what](given)


if __name__ == "__main__":
    main()
