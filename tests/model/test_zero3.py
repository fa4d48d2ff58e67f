"""Surgery on a model that ZeRO-3 has already sharded: same loss and same gradients as on a whole one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.surgery import SubLN, insert_subln, quantize_linears
from bitdistill_ray.model.taps import attention_taps
from tests.tiny_models import packed_batch, tiny_model

RANKS = 2
TERNARY = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None)
SEQ2 = QuantSpec(format=Format.SEQ2, granularity=Granularity.ROW, group_size=None)


class Loss(nn.Module):
    """The whole road in one forward pass: packed documents, tapped states, the head on two chunks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, seed: int) -> Tensor:
        batch = packed_batch([[9, 7]], 16, seed=seed)
        with attention_taps(self.model, (1,)) as states:
            hidden_BTD = hidden_states(self.model, batch)
        head = LMHead(self.model)
        chunks = [head(chunk).logsumexp(-1).sum() for chunk in hidden_BTD.chunk(2, dim=1)]
        return sum(chunks) + states[1].q_BHTC.square().sum()


def operate(model: nn.Module) -> None:
    quantize_linears(model, lambda name, _: SEQ2 if "mlp" in name else TERNARY)
    insert_subln(model, SubLN.ALL)


def rank_main(rank: int, port: int, case: str, folder: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from bitdistill_ray.student.engine import without_run_time_builds

    without_run_time_builds()

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # zero.Init reads it
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = tiny_model(case)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 0, "not sharded"
    operate(model)
    engine, *_ = deepspeed.initialize(
        model=Loss(model), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
    )
    loss = engine(rank)
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(p) for name, p in engine.module.model.named_parameters()}
    torch.save((loss.detach(), gradients), f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3", "llama-untied"])
def test_a_sharded_student_computes_what_a_whole_one_does(case: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, args=(port, case, str(tmp_path)), nprocs=RANKS)
    model = tiny_model(case)
    operate(model)
    losses = [Loss(model)(rank) for rank in range(RANKS)]
    (sum(losses) / RANKS).backward()
    for rank in range(RANKS):
        loss, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-5, atol=1e-5)
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m
            )
