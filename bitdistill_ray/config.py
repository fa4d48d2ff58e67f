"""The typed configuration tree.  One recipe is one `Config`; YAML files and `key=value` overrides only fill it in.

Importing this costs neither torch nor ray, so that `--plan`, `--help` and the tests of every shipped recipe are cheap.
Unknown keys are refused (`recipe.py` turns pydantic's findings into one line with the nearest known key), and
combinations that cannot work are refused here, in one place, before anything starts.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, model_validator

from bitdistill_ray.core import Coding, Format, Granularity, Payload, QuantSpec, Rounding, ScaleDtype
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.loss_config import SEARCH, AdaptiveWeight, LossConfig, RelationConfig
from bitdistill_ray.monitor_config import MonitorConfig
from bitdistill_ray.section import Strict
from bitdistill_ray.stage_config import (
    CalibratedStage,
    RefineStage,
    SearchStage,
    Sources,
    StageConfig,
    StudentStage,
    TaskSources,
    TrainStage,
)

NEED_A_STUDENT = ("awq", "clip", "gptq", "reconstruct", "pretrain", "search", "distill", "export")


class Dtype(StrEnum):
    """Compute dtype.  AUTO is bf16 where the hardware multiplies it natively, else fp32; the reason is printed."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class ModelConfig(Strict):
    """Which models."""

    teacher: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A Hugging Face id, a folder, `s3://…`, a `.gguf` file, or `wheel:NAME==VERSION/FILE`."""
    student: str | None = None
    """Where the student's weights come from; empty: from the teacher (self-distillation)."""


class QuantConfig(Strict):
    """How the student's linears are quantised (`core.QuantSpec`), and which."""

    format: Format = Format.NF3
    granularity: Granularity = Granularity.GROUP
    group_size: int | None = 128
    activation_bits: int | None = None
    scale_dtype: ScaleDtype = ScaleDtype.FP16
    rounding: Rounding = Rounding.HALF_EVEN
    include: tuple[str, ...] = ("*",)
    """Patterns of linears to quantise."""
    exclude: tuple[str, ...] = ("*lm_head", "*embed_tokens")
    """Patterns of linears that stay in 16 bits."""

    @property
    def spec(self) -> QuantSpec:
        """The one QuantSpec that training, export, kernels and serving share."""
        return QuantSpec(
            format=self.format,
            granularity=self.granularity,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            scale_dtype=self.scale_dtype,
            rounding=self.rounding,
        )

    @model_validator(mode="after")
    def _possible(self) -> QuantConfig:
        _ = self.spec
        return self


class StorageConfig(Strict):
    """How `s3://` URLs are reached, of corpora, models and runs alike; credentials come from where S3 clients look."""

    endpoint_url: str | None = None
    """S3 endpoint other than AWS; empty: AWS_ENDPOINT_URL, then AWS."""
    region: str | None = None
    anonymous: bool = False
    timeout_s: float = Field(60, gt=0)
    """A request that is silent for so long is given up and made again."""
    patience_s: float = Field(120, ge=0)
    """How long a store that answers 503, or not at all, is asked again before a run stops and says why."""


class DataConfig(Strict):
    """The corpus and how it is cut into sequences."""

    sources: Sources = ()
    """The stream: paths, or sections with a path, its columns and a weight; `{source: PATH, weight: 2}` for short.

    With weights, sequences are drawn in proportion to them; each source then has passes of its own, and what the
    `write` stage wrote joins with weight 1."""
    task: TaskSources = ()
    """What a task is learned from (stages with `sources: task`): a task that ships, by its name or as
    `{task: NAME, path: …}`, or sources of prompt/response pairs."""
    sequence_length: int = Field(512, ge=8)
    shuffle_window: int = Field(1024, ge=1)
    """Sequences that are shuffled together."""
    seed: int = 0
    max_document_characters: int = Field(10_000_000, ge=1000)
    """A longer document is cut, and counted."""
    timeout_s: float = Field(1800, gt=0)
    """How long students wait for a batch, nodes that the cluster has yet to add included, before the run gives up."""


class CacheConfig(Strict):
    """Answers in storage, read by later epochs and later jobs; a worker asks here before it asks a teacher."""

    folder: str | None = None
    """Folder or `s3://…`, for any number of runs, teachers and payloads at once; empty: no cache."""
    coding: Coding = Coding.LOSSLESS
    """Of `topk` answers; compact: at most 300 bytes a token at k = 128 and 120 at k = 50."""
    block_sequences: int = Field(64, ge=1)
    """Sequences of one file."""
    memory_mib: int = Field(256, ge=1)
    """Blocks that one worker keeps in memory, together."""


class TeacherConfig(Strict):
    """The pool of frozen teachers: Ray actors that answer with TeacherSignals."""

    actors: int = Field(1, ge=1)
    """How many at the start."""
    min_actors: int | None = Field(None, ge=1)
    max_actors: int | None = Field(None, ge=1)
    """The pool shrinks and grows between these two, as students wait and teachers idle; empty: `actors`."""
    scale_every_s: float = Field(30, gt=0)
    """A window of observation; a change needs two in a row, and two more until the next."""
    join: str | None = None
    """Name of a pool that `bitdistill teacher up` started: its teachers are used, and this run starts none."""
    gpus: float = Field(0, ge=0)
    """GPUs of one actor: a fraction shares one, more than 1 spread the layers of a teacher that one cannot hold."""
    cpus: float = Field(1, ge=0)
    threads: int | None = Field(None, ge=1)
    """torch threads of one actor on CPUs; empty: all cores of its node."""
    dtype: Dtype = Dtype.AUTO
    payload: Payload = Payload.HIDDEN
    topk: int = Field(64, ge=1)
    """Entries of `payload: topk`."""
    samples: int = Field(32, ge=1)
    """Draws of `payload: sampled`, which serves `forward_kl` at temperature 1 and attention relations."""
    in_flight: int = Field(2, ge=1)
    """Requests that one student keeps under way."""
    timeout_s: float = Field(600, gt=0)
    """A request unanswered for so long is sent to another teacher; after `attempts`, the run stops and says why."""
    attempts: int = Field(3, ge=1)
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _cacheable(self) -> TeacherConfig:
        if self.cache.folder and self.cache.coding is Coding.COMPACT and self.payload is not Payload.TOPK:
            raise ConfigError("teacher.cache.coding", f"compact with teacher.payload={self.payload}, which is kept as "
                              "it is", "Use lossless, or teacher.payload=topk")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _whole_gpus(self) -> TeacherConfig:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ConfigError("teacher.gpus", f"{self.gpus}: above 1 Ray gives whole GPUs only",
                              f"Give {int(self.gpus)} or {int(self.gpus) + 1}")  # fmt: skip
        return self

    @property
    def least(self) -> int:
        """The fewest actors."""
        return self.actors if self.min_actors is None else self.min_actors

    @property
    def most(self) -> int:
        """The most actors."""
        return self.actors if self.max_actors is None else self.max_actors

    @model_validator(mode="after")
    def _possible(self) -> TeacherConfig:
        if not self.least <= self.actors <= self.most:
            raise ConfigError("teacher.actors", f"{self.actors} is not between min_actors {self.least} and max_actors "
                              f"{self.most}", "Give a number between them, or widen them")  # fmt: skip
        return self


class StudentConfig(Strict):
    """The students: Ray Train workers under DeepSpeed ZeRO."""

    workers: int = Field(1, ge=1)
    gpus: float = Field(0, ge=0)
    """GPUs of one worker (0: gloo on CPUs; 1: NCCL)."""
    cpus: float = Field(1, ge=0)
    threads: int | None = Field(None, ge=1)
    zero: Literal[0, 1, 2, 3] = 1
    dtype: Dtype = Dtype.AUTO
    micro_batch: int = Field(4, ge=1)
    """Sequences of one forward pass of one worker."""
    gradient_checkpointing: bool = False
    chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits exist at a time in the loss."""
    cuda_graph: bool = True
    """On GPUs, record the forward and backward pass and replay it, where that can be done (a line says why not)."""
    max_failures: int = Field(3, ge=0)
    """Restarts from the last checkpoint before the stage gives up."""
    start_timeout_s: float = Field(1800, gt=0)
    """How long they wait for room, nodes that the cluster has yet to add included, before the run gives up."""
    checkpoint_timeout_s: float = Field(1800, gt=0)
    """How long the upload of a checkpoint may take before the attempt is given up."""
    preemption_check_every: int = Field(10, ge=1)
    """Steps between questions to Ray whether a node is about to be taken away (a barrier of all workers)."""

    @property
    def resources(self) -> dict[str, float]:
        """What one worker asks Ray for."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def passes(self, batch_sequences: int) -> int:
        """Micro-batches of one worker in an optimiser step of `batch_sequences` over all workers."""
        return -(-batch_sequences // (self.workers * self.micro_batch))


class Config(Strict):
    """One run, from a teacher to a packed and measured student."""

    run: str = "runs/demo"
    """Folder or `s3://…` of everything the run leaves; the same folder continues the same run."""
    branch: str | None = None
    """Another run, whose finished stages are taken over as far as their configuration is this run's."""
    model: ModelConfig = ModelConfig()
    quant: QuantConfig = QuantConfig()
    data: DataConfig = DataConfig()
    storage: StorageConfig = StorageConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    monitor: MonitorConfig = MonitorConfig()
    stages: dict[str, StageConfig] = Field(default_factory=dict)
    """Stages in order, keyed by name; `kind` may be left out where the name says it; `NAME: false` drops one."""
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        if isinstance(raw.get("data"), str | list):
            raw["data"] = {"sources": raw["data"]}
        if isinstance(raw.get("stages"), dict):
            named = {name: ({} if stage is None else stage) for name, stage in raw["stages"].items()}
            raw["stages"] = {
                name: {"kind": name, **stage} if isinstance(stage, dict) else stage
                for name, stage in named.items()
                if stage is not False
            }
        return raw

    @model_validator(mode="after")
    def _possible(self) -> Config:
        kinds = [stage.kind for stage in self.stages.values()]
        refined = kinds.index("refine") if "refine" in kinds else len(kinds)
        for place, (name, stage) in enumerate(self.stages.items()):
            if place < refined and stage.kind in NEED_A_STUDENT:
                raise ConfigError(f"stages.{name}", "needs a student, and no refine stage before it makes one",
                                  "Put `refine` before it")  # fmt: skip
            self._check_text(name, stage, written="write" in kinds[:place])
            if isinstance(stage, TrainStage):
                self._check_batch(name, stage.batch_sequences)
                if stage.average and self.student.zero == 3:
                    raise ConfigError(f"stages.{name}.average", f"{stage.average} under ZeRO-3, where no rank holds "
                                      "the weights", "Set student.zero=2, or average=0")  # fmt: skip
            if isinstance(stage, StudentStage):
                self._check_relation(name, stage.loss.relation, searched="search" in kinds[:place])
            if isinstance(stage, StudentStage) and stage.loss.needs_teacher:
                self._check_payload(name, stage.loss)
            if isinstance(stage, SearchStage) and self.searching(name) is None:
                raise ConfigError(f"stages.{name}", "no later stage has loss.relation.layer=search",
                                  "Set it there, or leave the search out")  # fmt: skip
        return self

    @property
    def unused(self) -> tuple[str, ...]:
        """Settings without effect, of which a run warns."""
        return tuple(
            f"stages.{name}.loss.{key}: no effect without a KL (forward_kl, reverse_kl, jsd, cakld)"
            for name, stage in self.stages.items()
            if isinstance(stage, StudentStage)
            for key in stage.loss.unused
        )

    def searching(self, name: str) -> str | None:
        """The stage that a `search` stage finds the layer for: the first after it that asks for one."""
        later = list(self.stages.items())[list(self.stages).index(name) + 1 :]
        return next((key for key, stage in later if isinstance(stage, StudentStage) and stage.loss.relation
                     and stage.loss.relation.layer == SEARCH), None)  # fmt: skip

    def _check_relation(self, name: str, relation: RelationConfig | None, *, searched: bool) -> None:
        if relation is None:
            return
        if relation.layer == SEARCH and not searched:
            raise ConfigError(f"stages.{name}.loss.relation.layer", "search, and no `search` stage comes before it",
                              "Put one before it, such as search: {layers: [10, 14, 18, 22]}")  # fmt: skip
        if isinstance(relation.weight, AdaptiveWeight) and self.student.zero == 3:
            raise ConfigError(f"stages.{name}.loss.relation.weight", "adaptive under ZeRO-3, which shards what its "
                              "gradients would be measured on", "Set student.zero=2, or give a number")  # fmt: skip
        if isinstance(relation.weight, AdaptiveWeight) and self.student.dtype is Dtype.FP16:
            raise ConfigError(f"stages.{name}.loss.relation.weight", "adaptive in fp16, where gradients without a loss "
                              "scale vanish", "Set student.dtype=bf16, or give a number")  # fmt: skip

    def _check_batch(self, name: str, sequences: int) -> None:
        workers, passes = self.student.workers, self.student.passes(sequences)
        if sequences % (workers * passes):
            raise ConfigError(f"stages.{name}.batch_sequences", f"{sequences} do not divide among {workers} workers "
                              f"with {passes} micro-batches each",
                              f"Give a multiple of {workers * self.student.micro_batch}")  # fmt: skip

    def _check_payload(self, name: str, loss: LossConfig) -> None:
        payload, remedy = self.teacher.payload, "teacher.payload=hidden"
        known = {Payload.TOPK: "whose tail is known at 1", Payload.SAMPLED: "drawn at 1"}.get(payload)
        if known and loss.temperature != 1:
            raise ConfigError(f"stages.{name}.loss.temperature", f"{loss.temperature} with teacher.payload={payload}, "
                              f"{known}", f"Use temperature 1, or {remedy}")  # fmt: skip
        for kind in ("reverse_kl", "jsd", "cakld"):
            if payload is Payload.SAMPLED and getattr(loss, kind):
                raise ConfigError(f"stages.{name}.loss.{kind}", f"{getattr(loss, kind)} with teacher.payload=sampled, "
                                  "which is an unbiased forward_kl and nothing else",
                                  f"Use forward_kl, or {remedy}")  # fmt: skip

    def _check_text(self, name: str, stage: StageConfig, *, written: bool) -> None:
        calibrates = isinstance(stage, RefineStage) and stage.subln != "none" and stage.gain == "calibrated"
        if not (isinstance(stage, TrainStage | CalibratedStage) or calibrates):
            return
        match stage.sources if isinstance(stage, TrainStage) else "auto":
            case "task":
                readable, remedy = bool(self.data.task), "Set data.task=PATH"
            case "corpus":
                readable, remedy = bool(self.data.sources), "Set data=PATH"
            case "written":
                readable, remedy = written, "Put a `write` stage before it"
            case "auto":
                readable, remedy = written or bool(self.data.sources), "Set data=PATH, or put a `write` stage before it"
            case paths:
                readable, remedy = bool(paths), "Give it a path"
        if not readable:
            raise ConfigError(f"stages.{name}", "there is no text for it", remedy)
