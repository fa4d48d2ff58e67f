"""What `load` puts together: any model source, its stop tokens, its threads."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bitdistill_kernels
from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.packed.model import export_packed, load_packed_model
from bitdistill_serve.options import ServeOptions
from bitdistill_serve.requests import CompletionRequest
from bitdistill_serve.service import Service
from tests.serve.references import greedy, prompt_ids
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

TERNARY = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """`Service.load` sets the threads of its process, which is a replica; here it is the tests'."""
    before = torch.get_num_threads(), bitdistill_kernels.threads()
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(before[0])
    bitdistill_kernels.set_threads(before[1])


def packed_student(folder: Path) -> Path:
    model = tiny_model("qwen3")
    quantize_linears(model, TERNARY)
    export_packed(model, tiny_tokenizer(), folder, provenance={})
    return folder


def served_text(folder: Path, prompt: str, max_tokens: int) -> str:
    service = Service.load(ServeOptions(model=str(folder), slots=2, slot_tokens=64))

    async def scenario() -> str:
        service.start()
        request = CompletionRequest(model=service.name, prompt=prompt, max_tokens=max_tokens, temperature=0)
        stream = service.engine.submit(await service.prompts.completion(request))
        text = "".join([piece.text async for _, piece in stream])
        await service.stop()
        return text

    return asyncio.run(scenario())


def test_a_packed_student_is_served(tmp_path: Path) -> None:
    folder = packed_student(tmp_path / "packed")
    packed, _ = load_packed_model(folder)
    wanted = tiny_tokenizer().decode(greedy(packed, prompt_ids("The quick"), 12), skip_special_tokens=True)
    assert served_text(folder, "The quick", 12) == wanted


def test_a_full_precision_folder_is_served(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", "qwen3")
    wanted = tiny_tokenizer().decode(greedy(tiny_model("qwen3"), prompt_ids("dog."), 12), skip_special_tokens=True)
    assert served_text(folder, "dog.", 12) == wanted


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        Service.load(ServeOptions(model=str(tmp_path)))


@pytest.mark.parametrize("threads", [1, 3])
def test_torch_and_the_kernels_get_the_threads_that_were_asked_for(threads: int, tmp_path: Path) -> None:
    Service.load(ServeOptions(model=str(packed_student(tmp_path / "packed")), threads=threads))
    assert (torch.get_num_threads(), bitdistill_kernels.threads()) == (threads, threads)
