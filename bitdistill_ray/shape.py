"""A model's shape, read without loading it: what `--plan` computes with and what preflight checks against.

Reads `config.json` (folder, `s3://`, or the hub) or a GGUF header; imports no torch for folders and GGUF files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill_ray.errors import ModelError
from bitdistill_ray.storage import Storage

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a causal LM."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of the seven linears of one layer, by their usual names."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linears."""
        return self.layers * sum(n * k for n, k in self.linears.values())

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and, where it is not tied, of the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def read_shape(source: str, storage: Callable[[str], Storage] = Storage) -> ModelShape:
    """The shape of the model at `source` (as `model.sources.resolve` understands it).

    Raises:
        ModelError: nothing there, or a family that is not supported.
    """
    from bitdistill_ray.model.sources import resolve

    path = Path(resolve(source, storage=storage))
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise ModelError(str(path), "has no config.json", "Give the folder that holds the model's files")
        return _from_config(json.loads(file.read_text(encoding="utf-8")), source)
    from transformers import AutoConfig

    return _from_config(AutoConfig.from_pretrained(str(path)).to_dict(), source)


def _from_config(config: dict[str, Any], source: str) -> ModelShape:
    config = {**config, **config.get("text_config", {})}
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ModelError(source, f"is of family {family!r}", f"Supported: {', '.join(FAMILIES)}")
    heads = int(config["num_attention_heads"])
    return ModelShape(
        family=family,
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", family == "gemma3_text")),
    )


def _from_gguf(path: Path) -> ModelShape:
    from gguf import GGUFReader

    reader = GGUFReader(str(path))
    family = str(reader.fields["general.architecture"].contents())
    named = {"gemma3": "gemma3_text"}.get(family, family)
    if named not in FAMILIES:
        raise ModelError(str(path), f"is of family {family!r}", f"Supported: {', '.join(FAMILIES)}")

    def read(key: str, default: int | None = None) -> int:
        field = reader.fields.get(f"{family}.{key}")
        if field is None and default is None:
            raise ModelError(str(path), f"its header lacks {family}.{key}", "Use a complete GGUF file")
        return int(field.contents()) if field is not None else int(default or 0)

    tensors = {t.name: t for t in reader.tensors}
    heads, hidden = read("attention.head_count"), read("embedding_length")
    return ModelShape(
        family=named,
        layers=read("block_count"),
        hidden=hidden,
        intermediate=read("feed_forward_length"),
        heads=heads,
        kv_heads=read("attention.head_count_kv", heads),
        head_size=read("attention.key_length", hidden // heads),
        vocabulary=int(max(tensors["token_embd.weight"].shape)),
        tied="output.weight" not in tensors,
    )
