"""Which text a stage reads: what the teacher wrote, the configured corpus, or both."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.data.batch import token_batch
from bitdistill_ray.data.encoder import Encoder, StoredEncoder
from bitdistill_ray.data.feeder import Feeder
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.tables import read_texts
from bitdistill_ray.data.template import Template
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.evaluate_config import EvaluateStage, TextConfig
from bitdistill_ray.evaluation.suite import excerpt
from bitdistill_ray.stage_config import SourceConfig, TrainStage
from bitdistill_ray.stages.base import StageContext
from bitdistill_ray.student.quality import cut

WRITTEN = "written"


def corpus_of(context: StageContext, tokenizer: str | StoredEncoder) -> CorpusSpec:
    """The corpus of this stage.

    Raises:
        ConfigError: there is none.
    """
    stage, data = context.stage, context.config.data
    wanted = stage.sources if isinstance(stage, TrainStage) else "auto"
    text = context.earlier("text") if wanted in ("auto", "written") else None
    match wanted:
        case "auto" | "corpus":
            configured = data.sources
        case "task":
            configured = data.task
        case "written":
            configured = ()
        case _:
            configured = wanted
    sources = [source_of(context, source) for source in configured]
    if text is not None:
        weight = 1.0 if any(source.weight for source in sources) else None
        written = SourceConfig(path=context.run.storage.url_of(text), name=WRITTEN, weight=weight)
        sources.append(source_of(context, written))
    if not sources:
        raise ConfigError(f"stages.{context.name}.sources", f"{wanted!r} finds no text",
                          "Set data=PATH, or put a `write` stage before it")  # fmt: skip
    return CorpusSpec(
        sources=tuple(sources),
        tokenizer=tokenizer,
        sequence_length=data.sequence_length,
        seed=data.seed + (stage.seed if isinstance(stage, TrainStage) else 0),
        window=data.shuffle_window,
        max_document_characters=data.max_document_characters,
        prompt_is_target=isinstance(stage, TrainStage) and stage.prompt_is_target,
    )


def first_batches(corpus: CorpusSpec, sequences: int, *, batch: int = 4) -> list[TokenBatch]:
    """About `sequences` sequences of a corpus for calibration, read in this process."""
    feeder = Feeder(corpus, sequences_per_step=batch)
    try:
        return [token_batch(feeder.batch(step)) for step in range(-(-sequences // batch))]
    finally:
        feeder.close()


def texts_of(context: StageContext, texts: Iterable[TextConfig]) -> dict[str, str]:
    """Texts to measure on, whole, by name."""
    found = {}
    for text in texts:
        rows = read_texts(source_of(context, SourceConfig(path=text.path, text_column=text.text_column)))
        found[text.name] = text.join.join(rows)
    return found


def quality_windows(context: StageContext, encoder: Encoder) -> dict[str, np.ndarray]:
    """What a training stage measures now and then, in windows of a training sequence's length: `monitor.quality_texts`,
    else the texts of the `evaluate` stages, else the excerpt.

    Raises:
        DataError: a text that is shorter than one window.
    """
    monitor = context.config.monitor
    evaluated = [text for stage in context.config.stages.values() if isinstance(stage, EvaluateStage)
                 for text in stage.texts]  # fmt: skip
    texts = texts_of(context, monitor.quality_texts or evaluated) or {"excerpt": excerpt()}
    ids = dict(zip(texts, encoder.encode(list(texts.values())), strict=True))
    length, most = context.config.data.sequence_length, monitor.quality_tokens
    return {name: cut(name, tokens[:most], length) for name, tokens in ids.items()}


def _template(source: SourceConfig) -> Template | None:
    if source.template is None:
        return None
    answer = source.response_column or source.label_column
    return Template(source.template, answer, tuple(source.labels.items()))


def source_of(context: StageContext, source: SourceConfig) -> Source:
    """A configured source with the run's storage options."""
    storage = context.config.storage
    return Source(
        source.path,
        name=source.name,
        weight=source.weight,
        text_column=source.text_column,
        prompt_column=source.prompt_column,
        response_column=source.response_column if source.template is None else None,
        template=_template(source),
        endpoint_url=storage.endpoint_url,
        region=storage.region,
        anonymous=storage.anonymous,
        timeout_s=storage.timeout_s,
        patience_s=storage.patience_s,
    )
