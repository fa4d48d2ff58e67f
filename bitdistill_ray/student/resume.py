"""Going on from a checkpoint, with as many workers as saved it or with another number.

DeepSpeed's shards fit the number of ranks that wrote them.  For another number they are turned into DeepSpeed's
universal form first: fp32 master weights and both moments of Adam, whole, by parameter name, of which every rank takes
its slice; nothing is rounded on the way.  One rank of each node does it for its neighbours.
"""

from __future__ import annotations

import io
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.checkpoint import TAG, Position, gather, newest_good, sweep
from bitdistill_ray.student.retention import Saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is: its number of all `ranks`, its number on its node, and the node's number."""

    rank: int
    ranks: int
    local_rank: int
    node: int


def new_attempt(device: torch.device) -> str:
    """A word that all ranks share and no other attempt has; collective."""
    word = [secrets.token_hex(4)]
    dist.broadcast_object_list(word, device=device)
    return word[0]


def resume(
    engine: Any,
    *,
    run: Storage,
    stage: str,
    place: Place,
    attempt: str,
    zero: int,
    long: bool = False,
    device: torch.device,
    say: Callable[[str], None],
) -> Position:
    """Load the newest good checkpoint of this stage, if there is one, and return where it stood; collective.

    Raises:
        ConfigError: it was saved under another ZeRO stage, or with its parameters in another layout.
    """
    if place.rank == 0:
        sweep(run)
    found: list[Saved | None] = [newest_good(run, stage, say) if place.rank == 0 else None]
    dist.broadcast_object_list(found, device=device)
    saved = found[0]
    if saved is None:
        return Position(0, None)
    if saved.zero != zero:
        raise ConfigError("student.zero", f"{zero}, and the checkpoint of step {saved.step} is of ZeRO {saved.zero}",
                          f"Set student.zero={saved.zero} until this stage is finished")  # fmt: skip
    if saved.long != long:
        raise ConfigError("student.cuda_graph", f"the checkpoint of step {saved.step} was saved "
                          f"{'with' if saved.long else 'without'} its layout of the parameters",
                          f"Set student.cuda_graph={str(saved.long).lower()}, on GPUs as before, until this stage is "
                          "finished")  # fmt: skip
    universal = saved.ranks != place.ranks and zero > 0
    if universal and place.rank == 0:
        say(f"the checkpoint of step {saved.step} is {saved.ranks} workers' and is divided among {place.ranks} now")
    folder = Path(tempfile.gettempdir()) / f"bitdistill-{attempt}-{place.node}"
    try:
        if place.local_rank == 0:
            native = gather(run, stage, saved, folder)
            if universal:
                convert(native, folder / "universal")
        dist.barrier()
        position = _load(engine, folder / ("universal" if universal else "native"), universal=universal)
        dist.barrier()
    finally:
        if place.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return position


def convert(native: Path, universal: Path) -> None:
    """Write DeepSpeed's universal form of the checkpoint in `native`."""
    from deepspeed.checkpoint import ds_to_universal

    options = SimpleNamespace(input_folder=str(native / TAG), output_folder=str(universal / TAG), num_extract_workers=1,
                              num_merge_workers=1, keep_temp_folder=False, strict=True,
                              inject_missing_state=True)  # fmt: skip
    with redirect_stdout(io.StringIO()):
        ds_to_universal.main(options)


def _load(engine: Any, folder: Path, *, universal: bool) -> Position:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    decays = [group["weight_decay"] for group in inner.param_groups]
    engine._config.load_universal_checkpoint = universal  # what the configuration's checkpoint.load_universal sets
    _, client_state = engine.load_checkpoint(str(folder), tag=TAG)
    engine._config.load_universal_checkpoint = False
    if universal:  # DeepSpeed's ZeRO-3 gives all groups the first one's decay, and one step counter to count up in turn
        for group, decay in zip(inner.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
    return Position(**client_state["position"])
