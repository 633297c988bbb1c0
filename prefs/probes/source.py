"""What a saved probe's card says of where the probe is from: the model, the question, and how it was put.

Read of a card, beside `save_probe`'s own keys:

``model``
    What `prefs.models.loading.identity` gave for the rater.
``model_config``
    The rater's `ModelConfig` as plain JSON, enums by their names.
``system_prompt``
    The one that was rated with (``rating.system_prompt``), or null.
``template``
    ``question``, ``options`` (each with ``say``) and ``prefill`` (null: the model's own). For a probe at ``rating``.
``thought``
    ``seed``, ``temperature`` and ``top_p`` of the thought that vectors were captured after. For a probe at ``rating``
    of a rater that thinks.
``scale``
    ``low`` and ``high``: the range of the target.
``metrics``
    On held-out tasks, by name. May be left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefs.config import ModelConfig, ModelDType
from prefs.errors import UserError
from prefs.models.loading import EMBEDDED, ModelSpec, identity
from prefs.models.types import Question, Sampling
from prefs.probes.card import SavedProbe


@dataclass(frozen=True)
class Source:
    """Where a probe is from.

    Attributes
    ----------
    model
        The rater, as a config on the machine that it was trained on.
    identity
        Which model that is.
    system_prompt
        None: none was given.
    question
        The one that a probe at ``rating`` was trained after; None at other positions.
    thought
        Seed and sampling of the thought before the answer; None for a rater that answers at once.
    scale
        The lowest and the highest value of the target.
    metrics
        On held-out tasks, by name.
    """

    model: ModelConfig
    identity: Mapping[str, Any]
    system_prompt: str | None
    question: Question | None
    thought: tuple[int, Sampling] | None
    scale: tuple[float, float]
    metrics: Mapping[str, float]

    @classmethod
    def read(cls, saved: SavedProbe) -> Source:
        """Read a card.

        Raises
        ------
        UserError
            If it lacks something, or the model is one that gives no residual stream.
        """
        card = saved.card
        model = _model(_needed(card, "model_config", Mapping))
        if model.backend != "transformer_lens":
            raise UserError(f"the probe's card has a model of {model.backend}, which gives no residual vectors")
        at_rating = saved.probe.site.position == "rating"
        thinks = at_rating and model.thinking.enabled
        scale = _needed(card, "scale", Mapping)
        metrics = card.get("metrics")
        return cls(
            model=model,
            identity=_needed(card, "model", Mapping),
            system_prompt=_needed(card, "system_prompt", str, type(None)),
            question=_question(_needed(card, "template", Mapping), model) if at_rating else None,
            thought=_thought(_needed(card, "thought", Mapping), model) if thinks else None,
            scale=(_number(scale, "scale", "low"), _number(scale, "scale", "high")),
            metrics={
                str(name): float(value)
                for name, value in (metrics.items() if isinstance(metrics, Mapping) else ())
                if isinstance(value, int | float)
            },
        )

    def rater(self, device: str | None, path: str | None) -> ModelSpec:
        """The same model to be loaded here: of the card's precision and commit, on a device of this machine.

        Parameters
        ----------
        device
            Where to run it; None: as the card says.
        path
            Where it is now, if not where the card says.

        Raises
        ------
        UserError
            If what is there is another model; it says in what.
        """
        config = self.model
        if path is not None:
            config = replace(config, path=path)
        if device is not None:
            config = replace(config, device=device, device_map=None)
        if self.identity.get("dtype") in ModelDType.__members__:
            config = replace(config, dtype=ModelDType[self.identity["dtype"]])
        if self.identity.get("id") == config.path and not config.path.startswith(EMBEDDED):
            config = replace(config, revision=self.identity.get("revision"))
        spec = ModelSpec.from_config(config)
        here, trained = json.loads(json.dumps(identity(spec))), dict(self.identity)
        different = [
            f"{key} {trained.get(key)!r} and here {here.get(key)!r}"
            for key in dict.fromkeys([*trained, *here])
            if trained.get(key) != here.get(key)
        ]
        if different:
            raise UserError(
                f"{spec.path} is not the model that the probe was trained on, which had {'; '.join(different)}; say"
                " where that one is with model_path="
            )
        return spec


def _needed(card: Mapping[str, Any], key: str, *kinds: type, name: str = "") -> Any:
    value = card.get(key, ...)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"the probe's card has no {name or key}, which scoring new text needs: train the probe again")
    return value


def _number(card: Mapping[str, Any], name: str, key: str) -> float:
    return float(_needed(card, key, int, float, name=f"{name}.{key}"))


def _model(plain: Mapping[str, Any]) -> ModelConfig:
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.create(dict(plain))))
    except OmegaConfBaseException as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"the probe's card has no model_config that this version of prefs reads ({why})") from None
    assert isinstance(config, ModelConfig)
    return config


def _question(template: Mapping[str, Any], model: ModelConfig) -> Question:
    options = _needed(template, "options", list, name="template.options")
    says = tuple(
        _needed(option if isinstance(option, Mapping) else {}, "say", str, name="template.options with say")
        for option in options
    )
    prefill = _needed(template, "prefill", str, type(None), name="template.prefill")
    text = _needed(template, "question", str, name="template.question").strip()
    return Question(text, says, model.prefill if prefill is None else prefill)


def _thought(drawn: Mapping[str, Any], model: ModelConfig) -> tuple[int, Sampling]:
    seed = _needed(drawn, "seed", int, name="thought.seed")
    temperature, top_p = (_number(drawn, "thought", key) for key in ("temperature", "top_p"))
    return seed, Sampling(temperature, top_p, model.thinking.max_tokens)
