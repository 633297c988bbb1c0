"""The names of what probes are compared with, as they stand in tables."""

from __future__ import annotations

ORIGIN = "origin mean"
LENGTH = "length"
WORDS = "words (TF-IDF)"
EMBEDDING = "sentence embedding"
# Those that never look into the model, and so what a probe has to beat.
BLIND = (ORIGIN, LENGTH, WORDS, EMBEDDING)
RANDOM = "random direction"
WITHIN = "probe, origin means removed"
SHUFFLED = "probe, shuffled targets"
