"""Every family of the tests' zoo against plain transformers: what each can do here, and what its passes may share.

Tiny random models in float32; scores, answers, vectors, steering and likelihoods of rows in one batch and alone, with
thoughts of unequal lengths and without. Prints the table of docs/models.md: a family is marked where all is within 1e-3
(of a log-probability, of a vector's norm; texts are equal), and has the largest error otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import ChainMap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from families import Errors, errors
from zoo import FAMILIES, zoo_model

from prefs.models.loading import Models
from prefs.models.local.sharing import Sharing

ROUNDING = 1e-3
COLUMNS = {
    "score": ("scores", "scores after thoughts"),
    "sample": ("samples", "samples after thoughts", "thoughts", "completions"),
    "capture": ("residuals", "residuals after thoughts"),
    "steer": ("steered", "nll"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny models are no faster on more
    print("| `model_type` |", " | ".join(COLUMNS), "| passes |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name in sorted(arguments.families):
        with tempfile.TemporaryDirectory() as folder:
            spec = zoo_model(Path(folder), name)
            found = errors(spec)
            worst = {kind: max(own[kind] for own in found.values()) for kind in ChainMap(*found.values())}
            cells = [cell(worst, kinds) for kinds in COLUMNS.values()]
            print("|", " | ".join([name, *cells, passes(Models().get(spec).passes.sharing)]), "|", flush=True)


def cell(worst: Errors, kinds: tuple[str, ...]) -> str:
    error = max(worst[kind] for kind in kinds)
    return "✓" if error <= ROUNDING else f"{error:.2g}"


def passes(sharing: Sharing) -> str:
    if not sharing.several:
        kept = "one token" if sharing.single else "whole"
    else:
        kept = "all" if sharing.tree else "all but trees" if sharing.gaps else "aligned"
    alone = [] if sharing.rows else ["alone"]
    switch = [] if sharing.switch is None else ["alone beyond the switch of positions"]
    return ", ".join([*alone, kept, *switch])


if __name__ == "__main__":
    main()
