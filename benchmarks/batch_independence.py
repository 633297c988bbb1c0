"""A row's numbers do not depend on what stands beside it: random batches against each row alone.

``--batches`` batches of 2 to 8 conversations in random orders, whose lengths differ by up to 64 tokens, on tiny random
models of families with whole attention, windows, states, other positions and experts, thinking (thoughts of unequal
lengths) and not, in float32. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from batches import pool, thinking, worst_of_batches
from zoo import zoo_model

from prefs.models.loading import Models
from prefs.models.local.engine import LocalEngine

FAMILIES = ("llama", "gemma3_text", "qwen3_5_text", "mpt", "phi3_longrope", "mixtral")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000, help="of all families together")
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny models are no faster on more
    titles = [
        "family",
        "thinks",
        "batches",
        "rows",
        "padding up to",
        "log-probability off by",
        "vector off by",
        "other texts",
    ]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    count = arguments.batches // (2 * len(arguments.families))
    for name in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            engine = Models().get(zoo_model(Path(folder), name))
        assert isinstance(engine, LocalEngine)
        for thinks in (False, True):
            worst = worst_of_batches(thinking(engine) if thinks else engine, count, pool(40, seed=0), seed=1)
            numbers = f"{worst.rows:,} | {worst.padding} | {worst.scores:.0e} | {worst.vectors:.0e} | {worst.texts}"
            print(f"| {name} | {'yes' if thinks else 'no'} | {count} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
