"""`reconstruct`: each block learns to give what the model in full precision has at its place, before any training.

A round of clipping or GPTQ makes up for the error of one matrix; here all of a block's weights move together, through
the same fake quantisers as in training, and a block sees (and takes back) the errors of those before it.  It costs
`epochs` passes forward and backward over the calibration sequences, one block at a time: no teacher, no optimiser state
of the whole model.  BRECQ (arXiv 2102.05426) and EfficientQAT's first phase (arXiv 2407.11062) do the same for scales
and weights.

    loss = sum of (output - target)^2 / sum of target^2, over real tokens
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitdistill_ray.quant import ClipGrid, ClipStatistics
from bitdistill_ray.runs import StageRecord
from bitdistill_ray.stage_config import ReconstructStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.blocks import Block
from bitdistill_ray.stages.calibration import Calibration, calibrated
from bitdistill_ray.stages.clip import clip_linear, group_moments
from bitdistill_ray.stages.notes import Notes


@stage("reconstruct")
def reconstruct(context: StageContext) -> StageRecord:
    """Publish `student/`, whose blocks give nearly what they gave."""
    return calibrated(_reconstruct, context, role="reconstructed")


def _reconstruct(student: Calibration, notes: Notes) -> tuple[float, float]:
    options = student.options
    assert isinstance(options, ReconstructStage)
    real = [batch.segment_BT >= 0 for batch in student.batches]
    before, after = 0.0, 0.0
    for block in student.blocks(notes, group_moments):
        before += block_error(block, real)
        if options.clip:
            for name, linear in block.linears.items():
                clip_linear(linear, block.statistics[name], ClipGrid(), name=name)
        train_block(block, real, epochs=options.epochs, learning_rate=options.learning_rate)
        after += block_error(block, real)
    return before, after


@torch.no_grad()
def block_error(block: Block[ClipStatistics], real: list[Tensor]) -> float:
    """The loss of a block as it stands, over all batches."""
    sums = [_sums(block, number, real_BT) for number, real_BT in enumerate(real)]
    return float(sum(s[0] for s in sums) / sum(s[1] for s in sums))


def train_block(block: Block[ClipStatistics], real: list[Tensor], *, epochs: int, learning_rate: float) -> None:
    """AdamW over fp32 copies of the layer's parameters, as in training: the forward pass sees them rounded."""
    trained = [parameter for parameter in block.layer.parameters() if parameter.requires_grad]
    masters = [nn.Parameter(parameter.detach().float()) for parameter in trained]
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = epochs * len(real)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        number = step % len(real)
        with torch.enable_grad():
            error, power = _sums(block, number, real[number])
            gradients = torch.autograd.grad(error / power, trained, allow_unused=True)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float()
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                parameter.copy_(master)


def _sums(block: Block[ClipStatistics], number: int, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """fp32: squared error of the outputs of batch `number` over its real tokens, and the targets' own squares."""
    target_BTD, output_BTD = block.targets[number].float(), block.outputs(number).float()
    real = real_BT.to(target_BTD.device).unsqueeze(-1)
    return ((output_BTD - target_BTD).square() * real).sum(), (target_BTD.square() * real).sum()
