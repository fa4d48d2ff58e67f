"""What `serve run bitdistill_serve.app:build KEY=VALUE …` and `bitdistill serve` can set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitdistill_ray.errors import ServeError


class ServeOptions(BaseModel):
    """One model behind one deployment."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = Field(min_length=1)
    """A packed folder, or any model source: a Hugging Face id, a folder, `s3://…`, a `.gguf` file."""
    name: str = ""
    """What clients call the model; empty: the last part of `model`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda` asks Ray for one GPU."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the decoder, asked of Ray as CPUs; empty: every core of the node, and one CPU asked of Ray."""
    slots: int = Field(8, ge=1)
    """Sequences that generate at the same time."""
    slot_tokens: int = Field(2048, ge=2)
    """The longest sequence, prompt and answer together; the cache holds slots * slot_tokens tokens."""
    queue: int = Field(64, ge=0)
    """Generations that may wait for a slot; more are answered with 429."""
    prefill_tokens: int = Field(256, ge=1)
    """Prompt tokens read between two tokens of the running sequences."""

    @property
    def served_name(self) -> str:
        """The model's id in the API."""
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @classmethod
    def parse(cls, args: Mapping[str, object]) -> ServeOptions:
        """Read `key=value` arguments (texts or values); a local model path becomes absolute.

        Raises ServeError naming the key, and the nearest known one where it is unknown.
        """
        try:
            options = cls.model_validate(dict(args))
        except ValidationError as error:
            raise cls._one_line(error) from None
        local = Path(options.model).expanduser()
        return options.model_copy(update={"model": str(local.resolve())}) if local.exists() else options

    @classmethod
    def _one_line(cls, error: ValidationError) -> ServeError:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, cls.model_fields, 1, cutoff=0.5)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(cls.model_fields)}"
            return ServeError(key, "unknown option", remedy)
        if first["type"] == "missing":
            return ServeError(key, "is not given", f"Add {key}=…, such as {key}=runs/demo/packed")
        return ServeError(key, f"{first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}", "Give another value")
