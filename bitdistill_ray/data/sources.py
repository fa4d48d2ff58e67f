"""What a corpus is: where its files lie, which columns hold its text, and how they become sequences.

These are the plain arguments of everything in `bitdistill_ray.data`; a recipe's `data` section is turned into them.
They travel to Ray's workers, so they hold no connection and no credentials (S3 clients find those for themselves).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from fractions import Fraction

from bitdistill_ray.data.encoder import Encoder, StoredEncoder, load_encoder
from bitdistill_ray.data.hub_id import HubId
from bitdistill_ray.data.template import Template
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.storage import PATIENCE_S, TIMEOUT_S, Storage

GLOB_CHARACTERS = "*?["


class FileFormat(StrEnum):
    """How a file holds documents; JSONL and text may be compressed with gzip or zstd as a whole."""

    ARROW = "arrow"
    JSONL = "jsonl"
    PARQUET = "parquet"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one kind of document.

    path             a folder (all files below it), a file, or a glob (`*` stays in a folder, `**` does not); local or
                     any URL of `Storage`; or `hub:ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]`
    name             first part of the sequence ids; empty: the last part of the path
    text_column      the column, or JSON key, of plain documents
    prompt_column    with response_column: supervised pairs instead of plain documents
    template         makes supervised pairs of whole rows
    weight           its share of the sequences, against the other sources' weights; None: all sources are one stream
    endpoint_url, region, anonymous, timeout_s, patience_s    as in `Storage`
    """

    path: str
    _: KW_ONLY
    name: str = ""
    weight: float | None = None
    text_column: str = "text"
    prompt_column: str | None = None
    response_column: str | None = None
    template: Template | None = None
    endpoint_url: str | None = None
    region: str | None = None
    anonymous: bool = False
    timeout_s: float = TIMEOUT_S
    patience_s: float = PATIENCE_S

    def __post_init__(self) -> None:
        if (self.prompt_column is None) != (self.response_column is None):
            raise ConfigError(f"data.sources: {self.path}", "only one of prompt_column and response_column is given",
                              "Give both for supervised pairs, or neither for plain text")  # fmt: skip
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"data.sources: {self.path}", f"a weight of {self.weight}", "Give a number above 0")

    @property
    def label(self) -> str:
        """The source's part of a sequence id: `name`, or the last literal part of the path."""
        parts = [part for part in self.path.replace("\\", "/").split("/") if part and not self._is_glob(part)]
        return escape_id(self.name or (parts[-1] if parts else "source"))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read: (text,), (prompt, response) or those of the template, its answer last."""
        if self.template is not None:
            return *self.template.fields, self.template.answer_column
        if self.prompt_column is not None and self.response_column is not None:
            return self.prompt_column, self.response_column
        hub = self.hub
        return (hub.column or self.text_column if hub else self.text_column,)

    @property
    def hub(self) -> HubId | None:
        """The Hugging Face data set that `path` names with `hub:`, or None."""
        return HubId.parse(self.path)

    @property
    def is_supervised(self) -> bool:
        """Whether documents are (prompt, response) pairs."""
        return self.prompt_column is not None or self.template is not None

    @property
    def reading(self) -> list[object]:
        """What decides how a row becomes text."""
        made = [self.template.text, self.template.words] if self.template is not None else []
        return [*self.columns, *made]

    @property
    def is_glob(self) -> bool:
        """Whether the path is a pattern; in a web address `?` opens the query."""
        is_web = self.path.startswith(("http://", "https://"))
        return self._is_glob(self.path.partition("?")[0] if is_web else self.path)

    def storage(self, url: str) -> Storage:
        """The store at `url`, with this source's options."""
        return Storage(url, endpoint_url=self.endpoint_url, region=self.region, anonymous=self.anonymous,
                       timeout_s=self.timeout_s, patience_s=self.patience_s)  # fmt: skip

    @staticmethod
    def _is_glob(text: str) -> bool:
        return any(character in text for character in GLOB_CHARACTERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSpec:
    """Everything that decides which sequences there are, and in which order.

    tokenizer                an Encoder, here or stored, or what `load_encoder` makes one of: a folder, a hub id
    sequence_length          tokens of a sequence (T)
    window                   sequences that are shuffled together
    max_document_characters  a longer document is tokenised in pieces of this size, so that none fills the memory
                           (tokenising costs a worker about 125 bytes per character of a piece)
    prompt_is_target         supervised pairs: whether the prompt's tokens are to be predicted too
    end_token                what ends a document; empty: the tokenizer's eos token (an Encoder knows its own)
    """

    sources: tuple[Source, ...]
    tokenizer: str | Encoder | StoredEncoder
    sequence_length: int
    seed: int = 0
    window: int = 1024
    max_document_characters: int = 1_000_000
    prompt_is_target: bool = False
    end_token: str | None = None

    def __post_init__(self) -> None:
        for key, least in (("sequence_length", 2), ("window", 1), ("max_document_characters", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"data.{key}", f"{getattr(self, key)}", f"Give at least {least}")
        if not self.sources:
            raise ConfigError("data.sources", "no source at all", "Give a path")
        labels = [source.label for source in self.sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError("data.sources", f"two sources are called {label!r}", "Give each a `name` of its own")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ConfigError("data.sources", "some sources have a weight and some have none",
                              "Give each a `weight`, or none of them")  # fmt: skip

    def encoder(self) -> Encoder:
        """The tokenizer, loaded here unless it came along; raises what `load_encoder` raises."""
        if isinstance(self.tokenizer, StoredEncoder):
            return self.tokenizer.fetch()
        if isinstance(self.tokenizer, Encoder):
            return self.tokenizer
        return load_encoder(self.tokenizer, end_token=self.end_token)

    @property
    def is_weighted(self) -> bool:
        """Whether the sources are a mixture with weights, each a stream of its own."""
        return self.sources[0].weight is not None

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """The weights of a weighted mixture, summing to 1 exactly."""
        weights = [Fraction(source.weight or 0) for source in self.sources]
        return tuple(weight / sum(weights) for weight in weights)


def escape_id(part: str) -> str:
    """A part of a sequence id: `#` separates the parts, so it becomes %23 inside one."""
    return part.replace("%", "%25").replace("#", "%23")
