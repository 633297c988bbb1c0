"""What an engine's proofs of itself cost, beside loading the model and beside the work that they stand before.

Processor time of one thread on the embedded model in float32, median of ``--times``. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from prefs.models.loading import Models, ModelSpec
from prefs.models.local.engine import LocalEngine
from prefs.models.local.proof import Proof
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Capture, Message, Question, Request, Steering

QUESTION = Question("How much did you like that, from 1 to 5?", tuple("12345"), "Answer: ")
CONVERSATION = (Message("user", "What is 6 times 7?"), Message("assistant", "It is 42, as everyone knows. " * 10))
CAPTURE = Capture((10, 20, 29), ("mean_completion", "rating"))


def processor_s(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = ModelSpec("smollm2", "embedded:smollm2", dtype="float32", device="cpu")
    engine = Models().get(spec)
    assert isinstance(engine, LocalEngine)
    steering = (Steering(15, torch.ones(engine.d_model), 1.0, "question"),)
    asked = [
        Request((Message("user", f"{number}. {CONVERSATION[0].content}"), CONVERSATION[1]), QUESTION, scores=(0,))
        for number in range(arguments.conversations)
    ]
    captured = [Request(request.messages, QUESTION, scores=(0,), capture=CAPTURE) for request in asked]

    def rated(requests: list[Request], proof: Proof | None) -> None:
        engine.proof = proof
        list(engine.run(requests))

    proven = Proof(engine)
    proven.before(captured)
    work = {
        "load the model, all proofs of loading with it": lambda: Models().get(spec),
        "of it tokens: the chat encoder, whose ids are held against `apply_chat_template`'s": lambda: ChatEncoder(
            engine.encoder.tokenizer, spec.chat_template_kwargs, spec.thinking
        ),
        "of it passes: what may be shared is tried out": engine.try_sharing,
        "capture, once": lambda: Proof(engine).before(captured),
        "steering, once for each range of tokens": lambda: Proof(engine).before(
            [Request(CONVERSATION, QUESTION, steering=steering)]
        ),
        f"{len(asked)} conversations of 150 tokens rated and captured, unproven": lambda: rated(captured, None),
        "the same, with log-probabilities rebuilt in batches 1, 2, 4, ...": lambda: rated(captured, proven),
    }
    print("| work | processor time (s) |\n|---|---|")
    for name, of_it in work.items():
        print(f"| {name} | {statistics.median(processor_s(of_it) for _ in range(arguments.times)):.3g} |", flush=True)


if __name__ == "__main__":
    main()
