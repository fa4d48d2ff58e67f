"""What `serve run bitdistill_serve.app:build KEY=VALUE …`, `bitdistill serve` and `serve deploy` can set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    activation_bits: int | None = Field(None, ge=8, le=8)
    """8: activations of weight-only students are rounded to int8, group by group, on CPUs: 2.4 times the tokens/s
    of a 2-bit SmolLM2; KL .02 to itself on a 4-bit one, not measured on others."""
    queue: int = Field(64, ge=0)
    """Generations that may wait for a slot; more are answered with 429."""
    prefill_tokens: int = Field(256, ge=1)
    """Prompt tokens read between two tokens of the running sequences, at most."""
    event_ms: float = Field(16.0, ge=0)
    """Milliseconds between two events of a stream, at least: tokens that come faster go together, the first and the
    last ones at once (a screen shows 60 pictures a second)."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """The longest prompt; empty: as long as its slot allows."""
    max_output_tokens: int | None = Field(None, ge=1)
    """The longest answer, whatever a request asks for; empty: as long as its slot allows."""
    concurrency: int | None = Field(None, ge=1)
    """Generations that one client (an API key, without keys an address) may have at a time; empty: no limit."""
    queue_s: float = Field(60.0, gt=0)
    """Seconds that a request may wait for a slot; then it is answered with 503."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds that a request may take in all."""
    drain_s: float | None = Field(None, ge=0)
    """Seconds that a replica that is to stop may finish its streams; empty: as long as they may take."""
    body_bytes: int = Field(4 << 20, ge=1)
    """The largest body of a request; more is answered with 413."""
    body_s: float = Field(30.0, gt=0)
    """Seconds in which a body must have come; then 408."""
    keys: str = ""
    """A file of API keys (`bitdistill serve key` makes one); empty: anybody may ask."""
    min_replicas: int = Field(1, ge=0)
    """Replicas that Ray Serve keeps."""
    max_replicas: int = Field(1, ge=1)
    """Replicas that Ray Serve may start, as requests come."""

    @property
    def served_name(self) -> str:
        """The model's id in the API."""
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def limit(self) -> int:
        """Generations that a replica takes at a time, with and without a slot."""
        return self.slots + self.queue

    @property
    def drain(self) -> float:
        """`drain_s`, or what stands for it."""
        return self.timeout_s if self.drain_s is None else self.drain_s

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self

    @classmethod
    def parse(cls, args: Mapping[str, object]) -> ServeOptions:
        """Read `key=value` arguments (texts or values); local paths become absolute.

        Raises ServeError naming the key, and the nearest known one where it is unknown.
        """
        try:
            options = cls.model_validate(dict(args))
        except ValidationError as error:
            raise cls._one_line(error) from None
        paths = {name: _absolute(getattr(options, name)) for name in ("model", "keys")}
        return options.model_copy(update=paths)

    @classmethod
    def parse_several(cls, args: Mapping[str, Any]) -> list[ServeOptions]:
        """The options of one model, or of each of `models`, for which the other arguments hold too.

        Raises ServeError, also where two models would have the same name.
        """
        given = dict(args)
        several = given.pop("models", None)
        if several is None:
            return [cls.parse(given)]
        if not isinstance(several, Sequence) or not all(isinstance(one, Mapping) for one in several) or not several:
            raise ServeError("models", "is not a list of options", "Give models: [{model: PATH, name: NAME}, …]")
        parsed = [cls.parse(given | dict(one)) for one in several]
        names = [options.served_name for options in parsed]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ServeError("models", f"two are called {twice[0]!r}", "Give each a name of its own")
        return parsed

    @classmethod
    def _one_line(cls, error: ValidationError) -> ServeError:
        first = error.errors()[0]
        if not first["loc"]:
            return ServeError("options", str(first["ctx"]["error"]), "Give other values")
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, cls.model_fields, 1, cutoff=0.5)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(cls.model_fields)}"
            return ServeError(key, "unknown option", remedy)
        if first["type"] == "missing":
            return ServeError(key, "is not given", f"Add {key}=…, such as {key}=runs/demo/packed")
        return ServeError(key, f"{first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}", "Give another value")


def _absolute(path: str) -> str:
    local = Path(path).expanduser()
    return str(local.resolve()) if path and local.exists() else path
