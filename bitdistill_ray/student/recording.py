"""A student's forward and backward pass over a micro-batch, recorded as two CUDA graphs and replayed ever after.

The pass of a small student is a few thousand short kernels, which Python hands to a GPU more slowly than it works them
off.  A recording hands them over at once.  torch makes it (`torch.cuda.make_graphed_callables`); what is ours is the
pass as a function of tensors alone.  Gradients leave it where they always do, at the parameters or at the two long ones
that stand for them (`layout.py`), so DeepSpeed and its accumulation do not notice.

It asks for parameters that stay where they are (ZeRO-0 to ZeRO-2), micro-batches of one shape, and a pass that never
asks the device anything.  Between steps its activations keep their memory, which is the peak's and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitdistill_ray.config import StudentConfig
from bitdistill_ray.core import TeacherSignals, TokenBatch
from bitdistill_ray.errors import ModelError
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.taps import FLEX
from bitdistill_ray.student.layout import Layout, OwnParameters
from bitdistill_ray.student.module import LossModule

WARM_UPS = 2  # passes before the recording: whatever compiles or allocates on first use has done so


def can_record(
    student: StudentConfig, dtype: torch.dtype, device: torch.device, *, attention: str = FLEX
) -> tuple[bool, str]:
    """Whether this student's pass is recorded, and why (not), to be printed."""
    if device.type != "cuda":
        return False, "no GPU"
    if not student.cuda_graph:
        return False, "student.cuda_graph is off"
    if attention != FLEX:
        return False, f"masks of {attention} ask the device"
    if student.zero == 3:
        return False, "ZeRO-3 gathers inside it"
    if dtype is torch.float16:
        return False, "fp16 needs the loss scale in it"
    if student.gradient_checkpointing:
        return False, "gradient checkpointing asks for the generator's state in it"
    return True, "one launch for each"


class Recording:
    """`LossModule.loss` by replay.  The first call records, after which every call must have its shapes.

    Gradients arrive at the leaves of `layout`.  On a CPU, which records nothing, it is the same function unrecorded.
    """

    def __init__(self, module: LossModule, layout: Layout | None = None) -> None:
        self._module, self._layout = module, layout or OwnParameters(module)
        self._shapes, self._places = list[torch.Size](), list[int]()
        self._replay: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None

    def __call__(
        self, batch: TokenBatch, signals: TeacherSignals | None, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective, ready for its backward pass before the next call, and its parts.

        Raises:
            ModelError: another shape than the first call's, or parameters that have moved since.
        """
        tensors = [batch.ids_BT, batch.target_BT, batch.segment_BT, totals.counts, *tensors_of(signals)]
        leaves = self._layout.leaves()
        shapes, places = [tensor.shape for tensor in tensors], [leaf.data_ptr() for leaf in leaves]
        if self._replay is None:
            self._shapes, self._places = shapes, places
            run = _OnTensors(self._module, self._layout, signals)
            aliases = [leaf.detach().requires_grad_() for leaf in leaves]
            recorded = batch.ids_BT.is_cuda
            self._replay = _record(run, (*(tensor.clone() for tensor in tensors), *aliases)) if recorded else run
        if (shapes, places) != (self._shapes, self._places):
            raise ModelError("micro-batch", f"has shapes {[list(s) for s in shapes]}, recorded were "
                             f"{[list(s) for s in self._shapes]}, or its parameters have moved",
                             "Set student.cuda_graph=false")  # fmt: skip
        value, parts = self._replay(*tensors, *leaves)
        return value.clone(), {name: part.clone() for name, part in parts.items()}  # the next replay overwrites them


def _record(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    """`run` on CUDA graphs; `inputs` become the memory that it reads."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            value, parts = run(*inputs)
            torch.autograd.grad(value, leaves, allow_unused=True)
    del value, parts
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the recording has memory of its own, and needs as much
    return torch.cuda.make_graphed_callables(
        run, inputs, num_warmup_iters=0, allow_unused_input=True, pool=_memory(inputs[0].device).pool()
    )


@cache
def _memory(device: torch.device) -> torch.cuda.CUDAGraph:
    """The owner of one memory for all recordings of a process: a pass ends, with its backward pass, before another's
    begins.  It is a recording too, and stays: memory whose last recording is gone cannot be recorded into again."""
    owner = torch.cuda.CUDAGraph()
    with torch.cuda.graph(owner):
        torch.zeros(1, device=device)
    return owner


class _OnTensors:
    """The pass as a function of tensors: of a batch, its totals, what the teacher said, and the leaves.

    A leaf's gradient is made for whatever stream its accumulator was born on, which for one of DeepSpeed's is no stream
    that records; so a recording is differentiated by aliases of the leaves, which share their memory.
    """

    def __init__(self, module: LossModule, layout: Layout, signals: TeacherSignals | None) -> None:
        self.loss, self.layout, self._like = _Loss(module), layout, signals
        self.leaves = len(layout.leaves())

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ids_BT, target_BT, segment_BT, counts, *said = tensors[: -self.leaves]
        batch = TokenBatch(ids_BT=ids_BT, target_BT=target_BT, segment_BT=segment_BT, sequence_ids=())
        signals = with_tensors(self._like, said)
        named = {f"module.{name}": tensor for name, tensor in self.layout.named(tensors[-self.leaves :]).items()}
        result: tuple[Tensor, dict[str, Tensor]] = functional_call(self.loss, named, (batch, signals, Totals(counts)))
        return result


class _Loss(nn.Module):
    """`LossModule.loss` as a module's `forward`, which is what `functional_call` calls."""

    def __init__(self, module: LossModule) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, batch: TokenBatch, signals: TeacherSignals | None, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.module.loss(batch, signals, totals)


def tensors_of(noun: Any) -> list[Tensor]:
    """The tensors in a dataclass and in those that it holds, in the order of their fields."""
    if isinstance(noun, Tensor):
        return [noun]
    if not is_dataclass(noun):
        return []
    return [tensor for field in fields(noun) for tensor in tensors_of(getattr(noun, field.name))]


def with_tensors(like: Any, tensors: list[Tensor]) -> Any:
    """`like` with `tensors` where its own are; the inverse of `tensors_of`."""
    if isinstance(like, Tensor):
        return tensors[0]
    if not is_dataclass(like) or isinstance(like, type):
        return like
    changed: dict[str, Any] = {}
    for field in fields(like):
        value = getattr(like, field.name)
        count = len(tensors_of(value))
        if count:
            changed[field.name], tensors = with_tensors(value, tensors[:count]), tensors[count:]
    return replace(like, **changed)
