"""The stages' sections of the configuration tree, and the pieces they share with the rest of it (see `config.py`)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.evaluate_config import EvaluateStage
from bitdistill_ray.loss_config import Loss, LossConfig
from bitdistill_ray.section import Strict
from bitdistill_ray.shipped import shipped
from bitdistill_ray.task_config import TASKS, Labels, with_task


class SourceConfig(Strict):
    """One corpus: a folder, file or glob of parquet, Arrow, JSONL or text (the last two also .gz, .zst), local or on
    `s3://`, `http(s)://`, `hf://` or what else fsspec knows; or `hub:ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]`."""

    path: str
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Share of the sequences against the other sources' weights; all sources have one, or none (all read as one)."""
    name: str = ""
    """First part of its sequence ids; empty: the last part of the path."""
    text_column: str = "text"
    prompt_column: str | None = None
    response_column: str | None = None
    """With prompt_column or a template: pairs of which the response is learned."""
    template: str | None = None
    """Prompt with `{column}` fields, answered by response_column or by the words of a label."""
    labels: Labels = Field(default_factory=dict)
    """The words of label 0, 1, …, or of each value of the label column."""
    label_column: str = "label"

    @model_validator(mode="after")
    def _answered(self) -> SourceConfig:
        where = f"data: {self.path}"
        if self.template is None and self.labels:
            raise ConfigError(where, "labels without a template", "Give the prompt as template")
        if self.template is not None and (self.prompt_column or bool(self.labels) == bool(self.response_column)):
            raise ConfigError(where, "a template is answered either by labels or by response_column",
                              "Give one of them, and no prompt_column")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _readable(self) -> SourceConfig:
        if self.path.startswith("hub:") and not re.fullmatch(r"hub:[^/:]+/[^/:]+(:[^:]*){0,3}", self.path):
            raise ConfigError(
                f"data: {self.path}", "not a data set's name", "Write hub:ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]"
            )
        return self


def _sources(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    return [_source(entry) for entry in value] if isinstance(value, list | tuple) else value


def _source(entry: Any) -> Any:
    """`PATH` and `{source: PATH, weight: 2}` are short for `{path: PATH, …}`; `{task: NAME}` for what that one says."""
    if isinstance(entry, str):
        return {"path": entry}
    entry = with_task(entry, split="train")
    if isinstance(entry, dict) and isinstance(entry.get("source"), str) and "path" not in entry:
        return {"path": entry["source"], **{key: value for key, value in entry.items() if key != "source"}}
    return entry


def _one_kind(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    if len({source.weight is None for source in sources}) > 1:
        bare = next(source.path for source in sources if source.weight is None)
        raise ConfigError("data", f"{bare} has no weight, and other sources have one",
                          "Give each a weight, or none of them")  # fmt: skip
    return sources


def _task(value: Any) -> Any:
    return with_task(value, split="train") if value in shipped(TASKS) else value


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_sources), AfterValidator(_one_kind)]
TaskSources = Annotated[Sources, BeforeValidator(_task)]


class RefineStage(Strict):
    """Stage 1: swap the linears, insert SubLN."""

    kind: Literal["refine"] = "refine"
    subln: Literal["none", "outputs", "all"] = "none"
    """outputs: in front of o_proj and down_proj (the paper); all: in front of all seven (the authors' code)."""
    gain: Literal["one", "calibrated"] = "calibrated"
    calibration_sequences: int = Field(8, ge=1)


class CalibratedStage(Strict):
    """What the stages share that change weights before training, measured on the first sequences of the corpus."""

    calibration_sequences: int = Field(32, ge=1)
    quantised_inputs: bool = False
    """Measure each block on what the blocks before it give once they are quantised, so that it sees their errors."""
    exclude: tuple[str, ...] = ()
    """Linears that stay as they are."""
    tasks: int = Field(1, ge=1)
    """Ray tasks that share the blocks, each with the resources of a student worker; what comes of it is the same."""

    @model_validator(mode="after")
    def _independent(self) -> CalibratedStage:
        if self.tasks > 1 and self.quantised_inputs:
            raise ConfigError("tasks", f"{self.tasks} with quantised_inputs, where a block waits for those before it",
                              "Set tasks=1, or quantised_inputs=false")  # fmt: skip
        return self


class GPTQStage(CalibratedStage):
    """GPTQ: every column is rounded in turn, and the columns behind it make up for the error."""

    kind: Literal["gptq"] = "gptq"
    clip: bool = True
    """Search each group's range first; without it the largest weights set the scales, as in the paper."""
    damping: float = Field(0.01, gt=0)
    """Added to the second moments' diagonal, as a share of its mean."""
    by_activation: bool = True
    """Columns with the largest inputs first."""


class AWQStage(CalibratedStage):
    """AWQ: input channels that carry much are made larger before rounding (for ternary: smaller, so that their level is
    higher), and divided out of what writes them."""

    kind: Literal["awq"] = "awq"
    steps: int = Field(20, ge=1)
    """Exponents that are tried."""


class ClipStage(CalibratedStage):
    """Asymmetric clipping search (BitDistiller), exact through Gram matrices; the paper's code excludes `*q_proj` and
    `*k_proj`."""

    kind: Literal["clip"] = "clip"
    grid: int = Field(20, ge=1)
    """Steps of the shrink factor on each side."""
    shrink: float = Field(0.5, gt=0, lt=1)
    """The largest part of a side that is cut off."""


class ReconstructStage(CalibratedStage):
    """Each block learns to give what it gave in full precision, before the whole student is trained (as BRECQ and
    EfficientQAT do)."""

    kind: Literal["reconstruct"] = "reconstruct"
    calibration_sequences: int = Field(64, ge=1)
    quantised_inputs: bool = True
    clip: bool = True
    """Search each group's range first."""
    epochs: int = Field(4, ge=1)
    """Passes of each block over the calibration sequences."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of the first step; it falls to 0 over a block's steps of four sequences."""


class WriteStage(Strict):
    """The teacher writes training text from prompts."""

    kind: Literal["write"] = "write"
    prompts: str = "builtin"
    """`builtin`, or a text, JSONL or parquet corpus with one prompt a line."""
    texts: int = Field(256, ge=1)
    """How many texts are written; prompts repeat with other seeds."""
    max_new_tokens: int = Field(192, ge=1)
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    held_out: float = Field(0.05, ge=0, lt=1)
    """The share that is kept from training for `evaluate`."""
    batch: int = Field(32, ge=1)
    """Texts that one teacher writes at a time."""
    max_repetition: float = Field(0.5, gt=0, le=1)
    """A text of which a larger share is repeated 8-grams is dropped, and counted."""
    seed: int = 0


class TrainStage(Strict):
    """What `finetune`, `pretrain` and `distill` have in common."""

    tokens: int = Field(1_000_000, ge=1)
    """Token budget; steps = tokens / (batch_sequences * sequence_length), at least 1."""
    batch_sequences: int = Field(8, ge=1)
    """Sequences of one optimiser step, over all workers."""
    learning_rate: float = Field(1e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0)
    average: float = Field(0.0, ge=0, lt=1)
    """Share of the steps, the last ones, whose weights' mean is what the stage gives; 0: the last step's weights."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest ones that are kept while the stage is under way."""
    keep_best: int = Field(0, ge=0)
    """Also keep so many with the lowest mean loss since the checkpoint before; they stay when the stage is finished."""
    sources: Literal["auto", "written", "corpus", "task"] | Sources = "auto"
    """written: by the `write` stage; corpus: `data.sources`; task: `data.task`; auto: written and corpus, whichever
    there are.  Or paths of its own."""
    prompt_is_target: bool = False
    """Also train on the prompts of prompt/response pairs."""
    seed: int = 0


class FinetuneStage(TrainStage):
    """The teacher learns a task in full precision (cross-entropy)."""

    kind: Literal["finetune"] = "finetune"


class StudentStage(TrainStage):
    """What `pretrain` and `distill` have in common: the quantised student learns."""

    loss: Loss
    quant_warmup_steps: int = Field(0, ge=0)
    """Steps in which weights and activations become quantised little by little, w + s (Q(w) - w) with s from 0 to 1;
    0: at once."""


class PretrainStage(StudentStage):
    """Continued pre-training of the quantised student on the stream."""

    kind: Literal["pretrain"] = "pretrain"
    loss: Loss = LossConfig(ce=1.0)


class DistillStage(StudentStage):
    """Distillation from the teacher pool."""

    kind: Literal["distill"] = "distill"
    loss: Loss = LossConfig(cakld=1.0)


class SearchStage(Strict):
    """The next stage with `loss.relation.layer=search` is run for a short while with each of some layers; the one with
    the lowest cross-entropy at the end is its layer."""

    kind: Literal["search"] = "search"
    layers: tuple[int, ...] = Field(min_length=2)
    """Of the teacher; negative ones count from the end."""
    tokens: int = Field(500_000, ge=1)
    """Budget of each; the learning rate falls to its end within it."""
    judged_on: float = Field(0.25, gt=0, le=1)
    """Share of the steps, the last ones, over which the cross-entropy is averaged: on rows that are new to the student
    as long as the budget is less than a pass over them."""


class ExportStage(Strict):
    """Quantise for good and write the packed folder."""

    kind: Literal["export"] = "export"
    baselines: bool = False
    """Also pack the student as it was before training (rounded to nearest, clipped, GPTQ's), for comparison."""
    head_bits: Literal[16, 8, 4] = 8
    """Bits of the embedding and the head; below 16 what it costs is measured and printed."""
    trits: bool = False
    """Store ternary codes five to a byte, 1.6 bits a weight: a smaller file, the same model in memory."""


StageConfig = Annotated[
    RefineStage
    | ClipStage
    | GPTQStage
    | AWQStage
    | ReconstructStage
    | WriteStage
    | FinetuneStage
    | PretrainStage
    | SearchStage
    | DistillStage
    | ExportStage
    | EvaluateStage,
    Field(discriminator="kind"),
]
