"""Every parameter of a model comes from its file: what a load left out, or a file has too much, ends it in one line.

transformers draws what a file lacks at random, and leaves out what it does not know, and goes on.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from prefs.errors import UserError, explained, first_line
from prefs.models import hub
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Message

log = logging.getLogger(__name__)

# What wrappers put into the names of what they wrap, and is not there when it is loaded: torch.compile and FSDP at any
# place, PEFT (merged weights, saved with the wrapper on) and DDP at the beginning.
WRAPPERS = {
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": r"\1",
    r"^base_model\.model\.": "",
    r"^module\.": "",
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NAMED = 3


def unwrapped(path: str, revision: str | None) -> dict[str, str] | None:
    """How names in a model's file are to be read (transformers' `key_mapping`): None, as they stand there.

    Raises
    ------
    UserError
        If two of them come to one name.
    """
    names = list(_tensors(path, revision))
    plain = names
    for pattern, replacement in WRAPPERS.items():
        plain = [re.sub(pattern, replacement, name) for name in plain]
    if plain == names:
        return None
    if twice := [name for name, count in Counter(plain).items() if count > 1]:
        raise UserError(f"model.path: the weights in {path} have {_some(twice)} twice, once in a wrapper; keep one")
    return WRAPPERS


def check_loaded(report: Mapping[str, Any], model: nn.Module, path: str) -> None:
    """Refuse a model some of whose parameters are not those of its file.

    A part of the file that the model does not have as a whole (a value head, an image encoder) is left out with a
    warning; what belongs to a module that the model does have (a bias, a scale, one layer more) is refused.

    Parameters
    ----------
    report
        What `from_pretrained` gives with `output_loading_info`. Tied weights and buffers that are never saved are not
        missing in it.

    Raises
    ------
    UserError
        If a parameter is missing, has another size, or goes with others that the model has no place for.
    """
    unexpected = sorted(report["unexpected_keys"])
    if missing := sorted(report["missing_keys"]):
        beside = f"; instead there are {_some(unexpected)}" if unexpected else ""
        raise UserError(f"model.path: the weights in {path} lack {_some(missing)}, which config.json asks for{beside}")
    if other_sizes := sorted(report["mismatched_keys"]):
        name, in_file, in_model = other_sizes[0]
        raise UserError(
            f"model.path: the weights in {path} do not fit its config.json: {name} is {list(in_file)} and not"
            f" {list(in_model)}" + (f"; so are {len(other_sizes) - 1} more" if other_sizes[1:] else "")
        )
    modules = dict(model.named_modules())
    if (stray := [name for name in unexpected if _goes_with(name, modules)]) and not hasattr(model, "hf_quantizer"):
        raise UserError(
            f"model.path: the weights in {path} have {_some(stray)}, for which the model that config.json describes has"
            " no place: the two do not fit together"
        )
    if unexpected:
        log.warning("%s: left out what the model does not have: %s", path, _some(unexpected))


def check_file(path: str, revision: str | None) -> None:
    """The same from a file's header alone, for a back-end that reads weights by itself: vLLM leaves what a file lacks
    as it finds it in memory. Quantised weights, whose names are its own, are left to it.

    Raises
    ------
    UserError
        As `check_loaded` does.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        log.warning("%s: whether its weights are whole is not checked: %s", path, first_line(error))
        return
    if getattr(config, "quantization_config", None) is not None:
        return
    with explained(f"cannot read the weights of {path}"), quiet():
        tensors = _tensors(path, revision)
        model, report = type(model).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_loaded(report, model, path)


def check_vocabulary(encoder: ChatEncoder, embeddings: int) -> None:
    """Refuse a tokenizer that writes tokens which the model has no embedding for, in text or in the turns of its chat
    template. Those that only images need may be (Gemma 3's).

    Raises
    ------
    UserError
        If it does, with the tokens.
    """
    tokenizer = encoder.tokenizer
    if max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder) < embeddings:
        return
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    text = set(tokenizer.get_vocab().values()) - encoder.control_ids
    if beyond := sorted(token for token in text.union(encoder.encode(turns, answer="").ids) if token >= embeddings):
        texts = _some(map(str, tokenizer.convert_ids_to_tokens(beyond)))
        raise UserError(
            f"model.path: the tokenizer of {tokenizer.name_or_path} writes {texts}, with ids up to {beyond[-1]}, and"
            f" the model has {embeddings:,} embeddings; give it the tokenizer that it was trained with"
        )


def _goes_with(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a parameter that a model does not have is of a module that it has, or of a further item of a list."""
    parts = name.split(".")
    known = max(end for end in range(len(parts)) if ".".join(parts[:end]) in modules)
    return known > 0 and (known == len(parts) - 1 or parts[known].isdigit())


def _tensors(path: str, revision: str | None) -> dict[str, torch.Tensor]:
    """By name, tensors without numbers of the shapes in a model's safetensors files."""

    def file(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    index = file(INDEX)
    shards = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {SINGLE}
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(shards):
        if (weights := file(shard)) is None:
            raise UserError(f"model.path: {path} has no {shard}")
        with safe_open(weights, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensors[name] = torch.empty(opened.get_slice(name).get_shape(), device="meta")
    return tensors


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and warnings: transformers' report on what it loaded is read here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with hub.quiet():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
