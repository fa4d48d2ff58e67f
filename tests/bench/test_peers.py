"""The peers' file is the shape that ours has, and what is compared stands beside each other in one table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, LlamaConfig

from bitdistill_ray.bench import peers
from bitdistill_ray.bench.kernels import parse_format
from bitdistill_ray.bench.limits import Place
from bitdistill_ray.bench.shapes import SHAPES
from bitdistill_ray.bench.subject import Load
from bitdistill_ray.errors import ConfigError

TINY = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny-llama", TINY)


def test_the_file_has_every_weight_of_the_shape(tmp_path: Path) -> None:
    reader = GGUFReader(peers.write_random("tiny-llama", tmp_path / "f16.gguf"))
    found = sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert found == sum(p.numel() for p in AutoModelForCausalLM.from_config(TINY).parameters())
    [down] = [tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight"]
    assert down.data.shape == (256, 512)
    assert 0.8 < float(down.data.astype("f4").std()) * 512**0.5 < 1.2  # keeps the size of what it multiplies


def test_a_shape_that_its_types_do_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"qwen3-0\.6b is qwen3"):
        peers.write_random("qwen3-0.6b", tmp_path / "f16.gguf")


def test_where_it_is_not_installed_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    peers.llama_cpp.cache_clear()
    with pytest.raises(ConfigError, match="make bench-peers"):
        peers.measure(
            "tiny-llama", [], Load(), Place(device=torch.device("cpu"), threads=1, pool_bytes=10**6), head_bits=8
        )


@pytest.mark.slow
def test_ours_stand_beside_the_best_peer() -> None:
    pytest.importorskip("llama_cpp", reason="built by make bench-peers")
    load = Load(batch=2, prompt_tokens=8, new_tokens=4)
    place = Place(device=torch.device("cpu"), threads=1, pool_bytes=10**6)
    rows = peers.measure("tiny-llama", [parse_format("ternary")], load, place, head_bits=8, rounds=1)
    assert {row.case for row in rows} == {
        "decode, batch 1", "prefill, batch 1 x 8", "decode, batch 2", "prefill, batch 2 x 8"
    }  # fmt: skip
    for case in {row.case for row in rows}:
        own, *others = [row for row in rows if row.case == case]
        assert own.format == "ternary"
        assert own.baseline == max(row.value for row in others)
        assert [row.format for row in others] == [f"llama.cpp {peer.name}" for peer in peers.PEERS]
