"""What every student worker does (`entry.py`): read, ask, learn, save.

Each optimiser step averages over the valid tokens of its whole batch: the ranks add up their counts before the first
backward pass, so that neither padding nor the number of workers or micro-batches changes the gradient.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch import Tensor

from bitdistill_ray import env
from bitdistill_ray.cache.client import open_cache
from bitdistill_ray.core import Payload, TeacherSignals
from bitdistill_ray.data.batch import BatchArrays, token_batch
from bitdistill_ray.errors import ModelError
from bitdistill_ray.hardware import compute_dtype
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.acceleration import accelerate
from bitdistill_ray.model.heads import FrozenHead
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.student import load_student, save_student
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.runs import provenance, storage_opener
from bitdistill_ray.student.averaging import WeightAverage
from bitdistill_ray.student.checkpoint import Checkpoints, Position
from bitdistill_ray.student.course import Course
from bitdistill_ray.student.engine import start_engine
from bitdistill_ray.student.figures import Figures
from bitdistill_ray.student.flops import Arithmetic
from bitdistill_ray.student.inbox import Answers, Inbox, Share
from bitdistill_ray.student.job import Lesson, TrainJob
from bitdistill_ray.student.layer_pairs import LayerPairs
from bitdistill_ray.student.layout import LongParameters, can_lay_out
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.objective import objective_of
from bitdistill_ray.student.preemption import Notice, PreemptedError
from bitdistill_ray.student.probes import Probes
from bitdistill_ray.student.quality import AskedTeacher, QualityProbe
from bitdistill_ray.student.recording import Recording, can_record
from bitdistill_ray.student.resume import Place, new_attempt, resume
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.client import TeacherClient
from bitdistill_ray.teacher.request import SignalRequest
from bitdistill_ray.teacher.roster import Roster

ASK_EVERY_S = 0.2  # for the lesson
LISTENING_S = 10.0  # before the first step, for the handler of SIGTERM to be in place
SignalsOf = Callable[[BatchArrays, torch.device], TeacherSignals | None]
"""What the teacher says about a micro-batch, on the student's device; None where no teacher is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step gave; `figures` are its losses by name, `tokens`, `stop` and, where there is one, `grad_norm`."""

    step: int
    sequences: Mapping[str, Any]
    figures: Figures
    learning_rate: float
    probed: Mapping[str, float]


class Worker:
    """One rank of one training stage."""

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.job, self.rank, self.ranks = job, context.get_world_rank(), context.get_world_size()
        student = job.config.student
        self.notice = Notice(check_every=student.preemption_check_every)
        self.notice.listen()  # first of all: from the first step on it must have been heard
        torch.set_num_threads(student.threads or env.cpu_count())
        self.device = ray.train.torch.get_device() if student.gpus else torch.device("cpu")  # sees its neighbours' too
        self.dtype, why = compute_dtype(student.dtype, self.device)
        self.micros = student.passes(job.stage.batch_sequences)
        self.model, self.tokenizer = self._load()
        if student.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        length = job.config.data.sequence_length
        self.arithmetic = Arithmetic.of(self.model, length=length, device=self.device, workers=self.ranks)
        self.lesson = self._lesson()
        self.pairs = LayerPairs.of(job.loss, job.relation_layer, teacher=lambda: self._ask_teacher("layers"),
                                   student=self.model.config.num_hidden_layers)  # fmt: skip
        self.client = self._client()
        module, watch = self._module(), job.config.monitor
        self.probes = Probes(module, watch, rank=self.rank, ranks=self.ranks, zero=student.zero, steps=job.steps,
                             quality=self._quality(module), say=self._say)  # fmt: skip
        self.stop, self.told = torch.zeros(()), False  # more than 0, and known, when a rank was told to go
        self.unread: deque[Outcome] = deque()
        # a step's figures are read when the next step is on its way, so that no GPU waits for Python
        self.late, self.read_at = int(self.device.type == "cuda"), time.perf_counter()
        share = job.stage.average
        self.average = WeightAverage(self.model, steps=job.steps, share=share) if share else None
        self.attempt = new_attempt(self.device)
        self.course = Course(module, job.stage, ranks=self.ranks, device=self.device)
        self.layout = self._record(module)
        self.checkpoints = self._checkpoints()
        self.engine = start_engine(self.layout or module, stage=job.stage, student=student, steps=job.steps,
                                   dtype=self.dtype)  # fmt: skip
        self._adopt()
        if self.rank == 0:
            dtype = str(self.dtype).removeprefix("torch.")
            self._say(f"student: {self.ranks} x {self.device} in {dtype} ({why}), ZeRO-{student.zero}, {self.micros} "
                      f"micro-batches of {student.micro_batch}")  # fmt: skip
            self._say(f"student: {self.speed}")

    def run(self) -> None:
        """From the newest checkpoint to the last step; then publish the weights."""
        position = self._resume()
        self.probes.start(position.step)
        if not self.notice.listening.wait(LISTENING_S):  # the main thread has run nothing meanwhile
            self._say(f"rank {self.rank}: not listening for SIGTERM yet, which would end it without a checkpoint")
        inbox = Inbox(
            self.job.feeder,
            self.client,
            Share(rank=self.rank, ranks=self.ranks, micros=self.micros),
            first=position.step,
            steps=self.job.steps,
            in_flight=self.job.config.teacher.in_flight,
            timeout_s=self.job.config.data.timeout_s,
            say=self._say,
        )
        self.read_at = time.perf_counter()
        for step, micros in enumerate(inbox, start=position.step):
            self.course.begin(step)
            losses, tokens = self.step(micros, inbox.signals, inbox.take_up)
            self.unread.append(self._outcome(step, losses, tokens, inbox.sequences))
            if self.average:
                self.average.add(step + 1)
            self._read(inbox, unread=self.late)
            self._save_if_due(step + 1, inbox)
        self._read(inbox, unread=0)
        self.checkpoints.close()
        self._publish()
        ray.train.report({"step": self.job.steps})

    def step(
        self, micros: list[BatchArrays], signals_of: SignalsOf, meanwhile: Callable[[torch.device], None] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step: (loss and parts averaged over all ranks' micro-batches, target tokens of all ranks).

        `meanwhile` is called whenever the device has a backward pass before it and this process nothing to do.
        """
        batches = [token_batch(arrays) for arrays in micros]
        totals = Totals(torch.zeros(3, dtype=torch.float64))
        for batch in batches:
            totals = totals + Totals.count(batch.labels_BT, batch.segment_BT)
        told = torch.tensor([float(self.notice.is_told())], dtype=torch.float64)
        counts = torch.cat([totals.counts, told]).to(self.device, non_blocking=True)
        dist.all_reduce(counts)
        counts, self.stop = counts[:3], counts[3]
        shared = Totals(counts).shared_by(self.ranks * self.micros)
        sums: dict[str, Tensor] = {}
        for arrays, batch in zip(micros, batches, strict=True):
            signals, batch = signals_of(arrays, self.device), batch.to(self.device)
            self.course.micro(batch, signals, shared)
            self.probes.micro(batch, signals, shared)
            value, parts = self.engine(batch, signals, shared)
            self.engine.backward(value)
            if meanwhile is not None:
                meanwhile(self.device)
            self.engine.step()
            for name, part in {"loss": value.detach(), **parts}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + part / self.micros
        stacked = torch.stack(list(sums.values()))
        dist.all_reduce(stacked)
        return dict(zip(sums, stacked / self.ranks, strict=True)), counts[0]

    def _outcome(
        self, step: int, losses: Mapping[str, Tensor], tokens: Tensor, sequences: Mapping[str, Any]
    ) -> Outcome:
        norm = self.engine.get_global_grad_norm()
        scalars = {**losses, **self.course.figures(), "tokens": tokens, "stop": self.stop}
        if norm is not None:
            scalars["grad_norm"] = torch.as_tensor(norm, device=self.device)
        return Outcome(step=step, sequences=sequences, figures=Figures(scalars),
                       learning_rate=self.engine.get_lr()[0], probed=self.probes.take())  # fmt: skip

    def _read(self, inbox: Inbox, *, unread: int) -> None:
        """Wait for the oldest steps' figures and report them, until only `unread` steps are left."""
        while len(self.unread) > unread:
            outcome = self.unread.popleft()
            figures = outcome.figures.read()
            self.told = self.told or figures.pop("stop") > 0
            if self.rank == 0:
                self._report(outcome, figures, inbox)

    def _report(self, outcome: Outcome, figures: dict[str, float], inbox: Inbox) -> None:
        """A row of the step; its seconds are those since the row before, without the wait for data."""
        tokens, norm = figures.pop("tokens"), figures.pop("grad_norm", None)
        waits = self.client.take_counters() if self.client else {"teacher_wait_s": 0.0}
        now, data_wait_s, inbox.data_wait_s = time.perf_counter(), inbox.data_wait_s, 0.0
        seconds, self.read_at = now - self.read_at - data_wait_s, now
        row = {
            "step": outcome.step,
            **outcome.sequences,
            **figures,
            "learning_rate": outcome.learning_rate,
            "grad_norm": norm,
            "tokens": int(tokens),
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "mfu": self.arithmetic.mfu(tokens / seconds),
            "data_wait_s": data_wait_s,
            **waits,
            **outcome.probed,
        }
        self._refuse_what_is_not_finite(row)
        self.notice.hear(self.job.monitor.step.remote(row))

    def _refuse_what_is_not_finite(self, row: Mapping[str, Any]) -> None:
        """Stop before such weights are saved.  An fp16 overflow is DeepSpeed's to skip, with a smaller loss scale."""
        norm = None if self.dtype is torch.float16 else row["grad_norm"]
        for name, value in (("loss", row["loss"]), ("gradient norm", norm)):
            if value is not None and not math.isfinite(value):
                raise ModelError(f"stages.{self.job.stage_name}", f"the {name} of step {row['step']} is {value}",
                                 "Lower the learning rate, or look at the data of that step")  # fmt: skip

    def _resume(self) -> Position:
        context, zero = ray.train.get_context(), self.job.config.student.zero
        place = Place(rank=self.rank, ranks=self.ranks, local_rank=context.get_local_rank(),
                      node=context.get_node_rank())  # fmt: skip
        position = resume(self.engine, run=self.job.run.storage, stage=self.job.stage_name, place=place, zero=zero,
                          attempt=self.attempt, device=self.device, long=self.layout is not None,
                          say=self._say)  # fmt: skip
        self._adopt()
        self.course.load(position.course)
        if self.average and position.average:
            self.average.load(position.average)
        if self.rank == 0:
            ray.get(self.job.feeder.resume.remote(position.ledger))
            ray.get(self.job.monitor.rewind.remote(position.step))
            if position.step:
                self._say(f"resumes at step {position.step} of {self.job.steps}")
        dist.barrier()
        return position

    def _say(self, line: str) -> None:
        self.job.monitor.say.remote(line)

    def _save_if_due(self, done: int, inbox: Inbox) -> None:
        """Save after `done` steps if it is time, or if a worker is about to be taken away."""
        draining = self.notice.draining(done - 1)
        if done == self.job.steps:
            return
        if self.told or draining or done % self.job.stage.checkpoint_every == 0:
            self._read(inbox, unread=0)
            self._save(done)
            self.read_at = time.perf_counter()
        if self.told:
            self.checkpoints.wait()
            self._say(f"told to stop (SIGTERM): saved step {done}")
            raise PreemptedError(f"a worker was told to stop; step {done} is saved")

    def _save(self, step: int) -> None:
        ledger, loss = ray.get(self.job.feeder.state.remote(step - 1)), None
        if self.rank == 0:
            ray.get(self.job.monitor.flush.remote())  # before the checkpoint counts, so that a resume finds every row
            rows = ray.get(self.job.monitor.own_rows.remote(since=step - self.job.stage.checkpoint_every))
            loss = sum(row["loss"] for row in rows) / max(1, len(rows))
        average = self.average.state() if self.average and self.rank == 0 else None  # as its weights do
        self.checkpoints.save(self.engine, Position(step, ledger, average, self.course.state()), loss=loss)

    def _checkpoints(self) -> Checkpoints:
        student, stage = self.job.config.student, self.job.stage
        return Checkpoints(
            self.job.run.storage,
            self.job.stage_name,
            rank=self.rank,
            ranks=self.ranks,
            attempt=self.attempt,
            zero=student.zero,
            long=self.layout is not None,
            last=stage.keep_checkpoints,
            best=stage.keep_best,
            timeout_s=student.checkpoint_timeout_s,
            say=self._say,
        )

    def _load(self) -> tuple[Any, Any]:
        if self.job.source is None:
            opener = storage_opener(self.job.config.storage)
            return load_model(str(self.job.model_source), dtype=self.dtype, storage=opener)
        return load_student(self.job.run.fetch(self.job.source), dtype=self.dtype)

    def _lesson(self) -> Lesson:
        """Wait for the teachers, which the driver starts meanwhile and gives up after `teacher.timeout_s`."""
        while True:
            try:
                lesson: Lesson | None = ray.get(self.job.monitor.lesson.remote())
            except RayError as error:
                raise user_error(error) or error from None
            if lesson is not None:
                return lesson
            time.sleep(ASK_EVERY_S)

    def _client(self) -> Answers | None:
        if not self.job.loss.needs_teacher:
            return None
        teacher = self.job.config.teacher
        request = SignalRequest(
            payload=teacher.payload,
            topk=teacher.topk,
            samples=teacher.samples,
            attention_layer=self.job.relation_layer,
            states_layers=tuple(layer for layer, _ in self.pairs.states),
        )
        client = TeacherClient(
            self.lesson.teachers,
            request,
            timeout_s=teacher.timeout_s,
            attempts=teacher.attempts,
            first=self.rank,
            say=self._say,
        )
        if not teacher.cache.folder or self.lesson.identity is None:
            return client
        return open_cache(client, teacher, self.job.config.storage, self.lesson.identity, say=self._say)

    def _module(self) -> LossModule:
        teacher_head = None
        if self.client is not None and self.job.config.teacher.payload is Payload.HIDDEN:
            teacher_head = self._teacher_head()
        length, zero = self.job.config.data.sequence_length, self.job.config.student.zero
        self.speed = accelerate(self.model, self.device, length=length, zero=zero, tapped=self.pairs.tapped)
        return LossModule(
            self.model,
            objective_of(self.job.loss),
            chunk_tokens=self.job.config.student.chunk_tokens,
            teacher_head=teacher_head,
            gamma=self.lesson.gamma,
            relation_layer=self.pairs.relation[1] if self.pairs.relation else None,
            states_layers=tuple(own for _, own in self.pairs.states),
        )

    def _ask_teacher(self, method: str) -> Any:
        return Roster.of(self.lesson.teachers).call(method, timeout_s=self.job.config.teacher.timeout_s)

    def _teacher_head(self) -> FrozenHead:
        message = self._ask_teacher("frozen_head")
        names = {name.removesuffix(":bf16") for name in message}
        return FrozenHead({name: wire.get(message, name) for name in names}).to(self.device)

    def _quality(self, module: LossModule) -> QualityProbe | None:
        if not self.job.quality:
            return None
        probe = QualityProbe(module, self.job.quality, rank=self.rank, ranks=self.ranks,
                             micro_batch=self.job.config.student.micro_batch, device=self.device)  # fmt: skip
        if self.client is not None:
            head = module.teacher_head or self._teacher_head()
            probe.ask(AskedTeacher(Roster.of(self.lesson.teachers), head, self.job.config.teacher.timeout_s))
        return probe

    def _record(self, module: LossModule) -> LongParameters | None:
        """Have the pass recorded where that can be done; the layout that DeepSpeed is to see, if it is not its own."""
        student, attention = self.job.config.student, self.model.config._attn_implementation
        recorded, why = can_record(student, self.dtype, self.device, attention=attention)
        self.speed += f"; passes {'' if recorded else 'not '}recorded: {why}"
        layout = None
        if can_lay_out(module, zero=student.zero, recorded=recorded):
            layout = LongParameters(module, self.device)
            self.speed += f", parameters laid out as {len(layout.leaves())}"
        if recorded:
            module.replay = Recording(module, layout)
        return layout

    def _adopt(self) -> None:
        if self.layout is not None:
            self.layout.adopt()

    def _publish(self) -> None:
        """Gather the working copy on rank 0 and publish it; ZeRO-3 gathers one parameter at a time."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.job.config.student.zero == 3):
                if self.rank == 0:
                    tensors[name] = parameter.detach().cpu().clone()
        if self.rank == 0:
            tensors |= self.average.tensors() if self.average else {}
            with self.job.run.publish(self.job.output) as folder:
                save_student(folder, self.model, self.tokenizer, tensors=tensors,
                             provenance=provenance(self.job.config, stage=self.job.stage_name))  # fmt: skip
        dist.barrier()
