"""What differs between the supported model families, as one table.  A new family is one more row.

The four families of today share the names of their modules; what differs to us are Gemma's norms (where they
stand, and gains that count from 1) and its logit softcap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitdistill_ray.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Names inside a Hugging Face causal LM of one `model_type`; module paths are relative to the whole model."""

    model_type: str
    layers: str = "model.layers"
    head: str = "lm_head"
    attention: str = "self_attn"  # in a layer
    linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    outputs: tuple[str, ...] = ("o_proj", "down_proj")  # write into the residual stream: SubLN's two places
    attention_norm: str = "input_layernorm"  # in a layer: what q, k and v read
    ffn_norm: str = "post_attention_layernorm"  # what gate and up read
    attention_out_norm: str | None = None  # what attention gives, before it is added; None: no norm there
    ffn_out_norm: str | None = None  # the same of the MLP
    gain_offset: float = 0.0  # a norm multiplies by its weight plus this
    softcap_key: str | None = None  # config key of c in logits = c tanh(logits / c)
    mask_of_each_kind: bool = True  # takes attention masks by a layer's kind, and not one for all layers


FAMILIES = {
    family.model_type: family
    for family in (
        Family(model_type="llama", mask_of_each_kind=False),
        Family(model_type="qwen2"),
        Family(model_type="qwen3"),
        Family(
            model_type="gemma3_text",
            ffn_norm="pre_feedforward_layernorm",
            attention_out_norm="post_attention_layernorm",
            ffn_out_norm="post_feedforward_layernorm",
            gain_offset=1.0,
            softcap_key="final_logit_softcapping",
        ),
    )
}


def family_of(config: Any) -> Family:
    """The row for a Hugging Face config.

    Raises:
        ModelError: a family that is not in the table.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type not in FAMILIES:
        raise ModelError(
            getattr(config, "_name_or_path", "") or "the model",
            f"is of family {model_type!r}",
            f"Supported: {', '.join(FAMILIES)}; a new one is a row in bitdistill_ray/model/families.py",
        )
    return FAMILIES[model_type]


def head_size(config: Any) -> int:
    """Numbers of one attention head of a Hugging Face config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention module of every layer, first layer first."""
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    return [layer.get_submodule(family.attention) for layer in layers.children()]


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(full name, linear) of every projection in the decoder layers, in the order of the model."""
    family = family_of(model.config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in family.linears:
            yield name, module
