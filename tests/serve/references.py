"""What the engine must write: the plain Hugging Face model, one whole forward pass for every token, no cache."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import cache

import torch
from transformers import PreTrainedModel

from tests.tiny_models import tiny_model, tiny_tokenizer

EOS_ID = 0


@cache
def shared_model() -> PreTrainedModel:
    """`tiny_model()`, made once; nothing changes it."""
    return tiny_model()


def prompt_ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def greedy(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The tokens of a greedy continuation, without the end token."""
    ids = list(prompt)
    for _ in range(max_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == EOS_ID:
            break
        ids.append(token)
    return ids[len(prompt) :]


@cache
def greedy_text(prompt: tuple[int, ...], max_tokens: int) -> str:
    """The text of a greedy continuation by `tiny_model()`."""
    return str(tiny_tokenizer().decode(greedy(shared_model(), prompt, max_tokens), skip_special_tokens=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
