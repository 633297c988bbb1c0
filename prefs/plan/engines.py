"""Engines that count what the real ones would run, from their conversations' tokens. They load a tokenizer and a
model's config, and make up what would be drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefs.models.loading import Models, ModelSpec
from prefs.models.types import Backend
from prefs.plan.book import Book
from prefs.plan.lengths import Lengths


@dataclass
class PlannedModels(Models):
    """In place of the models that a process loads, engines that count."""

    lengths: Lengths = field(kw_only=True)
    book: Book = field(default_factory=Book)

    def _load(self, spec: ModelSpec) -> Backend:
        if spec.backend == "openai":
            from prefs.plan.server import PlannedServer

            return PlannedServer(spec, self.lengths, self.book)
        if spec.backend == "vllm":
            from prefs.plan.vllm_requests import PlannedVllm

            return PlannedVllm(spec, self.lengths, self.book)
        from prefs.plan.transformer_lens import PlannedTransformerLens

        return PlannedTransformerLens(spec, self.lengths, self.book)
