"""From a model folder to a `TransformerBridge`: weights, where they go, and the attention that the model runs with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefs.errors import UserError, explained, first_line
from prefs.models.device import resolve_device
from prefs.models.loading import ModelSpec
from prefs.models.weights import check_loaded, quiet, unwrapped


class _Float32Unembedding(nn.Linear):
    """The output layer in float32: bfloat16 logits are up to 1/8 apart, too coarse for a probability of an option."""

    @classmethod
    def of(cls, linear: nn.Linear) -> _Float32Unembedding:
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight = nn.Parameter(linear.weight.detach().float(), requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # A model on several devices may have this layer on another than the last block, tied to the embedding.
        return super().forward(input.to(self.weight.device, torch.float32))


def load_bridge(spec: ModelSpec, path: str) -> tuple[Any, Any]:
    """Load weights (safetensors only, no remote code) and wrap them.

    Returns
    -------
    bridge, tokenizer
        The `TransformerBridge` and the transformers tokenizer.

    Raises
    ------
    UserError
        If the weights, the tokenizer or the device are not there, the weights are not those that the config asks for,
        TransformerLens does not know the family or cannot run it, or the model or the machine does not have the
        attention that is asked for.
    """
    device = None if spec.device_map else resolve_device(spec.device)
    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": False}
    with quiet():
        with explained(f"cannot load {spec.name} from {path}"):
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            if spec.attn_implementation != "auto":
                _check_attention(spec, path, options)
            model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                path,
                dtype=getattr(torch, spec.dtype),
                use_safetensors=True,
                attn_implementation="eager",
                device_map=spec.device_map,
                key_mapping=unwrapped(path, spec.revision),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
            check_loaded(report, model, path)
            if device is not None:
                model = nn.Module.to(model, device)
        return wrap(model, tokenizer, spec, path), tokenizer


def wrap(model: Any, tokenizer: Any, spec: ModelSpec, path: str) -> Any:
    """Put a transformers model, where it is and as it is, into a `TransformerBridge`.

    Every block runs the model's own modules in place of TransformerLens' reconstructions of them. Hooks inside a block
    need these, which hold all attention patterns; only the residual stream between blocks is read and changed here.

    Raises
    ------
    UserError
        If TransformerLens does not know the family, or cannot run it: a few tokens are run.
    """
    from transformer_lens.model_bridge import TransformerBridge

    unembedding = model.get_output_embeddings()
    if isinstance(unembedding, nn.Linear):
        model.set_output_embeddings(_Float32Unembedding.of(unembedding))
    device = model.get_input_embeddings().weight.device
    with explained(f"TransformerLens cannot wrap {spec.name}"), _installing_nothing():
        bridge = TransformerBridge.boot_transformers(
            path, hf_model=model.eval(), tokenizer=tokenizer, dtype=getattr(torch, spec.dtype), device=device
        )
    for block in bridge.blocks:
        _use_own_modules(block.original_component)
    _leave_out_what_is_not_there(model, bridge)
    # TransformerLens sets eager attention, so the choice is made after it.
    if spec.attn_implementation != "auto":
        model.set_attn_implementation(spec.attn_implementation)
    elif not _has_soft_cap(model.config):
        with contextlib.suppress(ValueError):  # a family without it
            model.set_attn_implementation("sdpa")
    with explained(f"{spec.name} does not run here"), torch.inference_mode():
        bridge(torch.zeros((1, 2), dtype=torch.long, device=device), return_type="logits")
    return bridge


@contextmanager
def _installing_nothing() -> Iterator[None]:
    """Keep TransformerLens 4.3 from installing torchvision with pip, which may bring another torch with it.

    It does so where the image processor of a model that also sees (Gemma 3) does not load. Only text is read here.
    """
    from transformer_lens.model_bridge.sources.transformers import helpers

    own = helpers._ensure_torchvision
    helpers._ensure_torchvision = lambda: False
    try:
        yield
    finally:
        helpers._ensure_torchvision = own


def _use_own_modules(module: nn.Module) -> None:
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    for name, child in list(module.named_children()):
        own = child.original_component if isinstance(child, GeneralizedComponent) else child
        if own is not None:
            setattr(module, name, own)
            _use_own_modules(own)


def _leave_out_what_is_not_there(model: nn.Module, bridge: Any) -> None:
    """Take TransformerLens' rotary embedding from a model that has none (GraniteMoeHybrid without positions)."""
    for path, component in bridge.real_components.values():
        if not isinstance(component, list) and component.original_component is None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, None)


def _has_soft_cap(config: Any) -> bool:
    """Whether attention scores are capped (Gemma 2), which torch's `scaled_dot_product_attention` leaves out."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def _check_attention(spec: ModelSpec, path: str, options: dict[str, Any]) -> None:
    """Refuse an attention that would fail, or silently compute something else, before any weights are loaded."""
    wanted = spec.attn_implementation
    config = AutoConfig.from_pretrained(path, **options)
    if wanted == "sdpa" and _has_soft_cap(config):
        raise _no_attention(spec, "it leaves out the soft cap of this model's attention scores")
    if wanted.startswith("flash") and spec.dtype == "float32":
        raise _no_attention(spec, "it computes in bfloat16 or float16 only, and model.dtype is float32")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=wanted, dtype=getattr(torch, spec.dtype))
    except (ImportError, ValueError) as error:
        raise _no_attention(spec, first_line(error)) from None


def _no_attention(spec: ModelSpec, reason: str) -> UserError:
    return UserError(
        f"model.attn_implementation: {spec.name} cannot run with {spec.attn_implementation} here ({reason});"
        " use auto or eager"
    )
