"""NativeDecoder against the torch decoder, whose cache rounds keys and values as the native one stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistill_kernels import instruction_sets, set_instruction_set, set_threads, threads
from bitdistill_kernels.decoder import CacheType
from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.decode.base import CapacityError, Decoder
from bitdistill_ray.decode.cache import SlotCache
from bitdistill_ray.decode.loading import decoder_over, load_decoder, why_not_native
from bitdistill_ray.decode.native_decoder import NativeDecoder
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import KernelError, ModelError
from bitdistill_ray.model import linear
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.model.surgery import SubLN, insert_subln, quantize_linears
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_ray.packed.model import export_packed, load_packed_model
from bitdistill_ray.packed.tables import HeadBits
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import fake_quantize_activation, quantize
from tests.tiny_models import CASES, VOCAB_SIZE, tiny_model, tiny_tokenizer

IDS = list(range(30, 53))
PROMPTS = [[5, 6, 7], list(range(20, 43)), [9], [100, 4, 100, 4, 100, 4, 77, 200]]
# A sum that differs in its last bit may round to the next fp16 or int8 number: rare, and then a step of that size.
MOST = {CacheType.FP16: 1e-3, CacheType.INT8: 3e-2}
MEAN = {CacheType.FP16: 3e-5, CacheType.INT8: 1e-3}
ALL = QuantSpec(format=Format.INT3, group_size=16, activation_bits=8)


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    chosen, count = instruction_sets()["chosen"], threads()
    yield
    set_instruction_set(chosen)
    set_threads(count)


def stored(cache: CacheType) -> Callable[[Tensor], Tensor]:
    """What a head's numbers are after they were in the cache."""

    def int8(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round().clamp(-127, 127) * scale

    return (lambda x: x.half().float()) if cache is CacheType.FP16 else int8


@pytest.fixture
def rounded_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, CacheType], TorchDecoder]:
    """A torch decoder whose keys and values are rounded as the cache of this type does."""
    update = SlotCache.update

    def make(model: Any, cache: CacheType) -> TorchDecoder:
        rounded = stored(cache)
        monkeypatch.setattr(
            SlotCache, "update", lambda self, k, v, *a, **kw: update(self, rounded(k), rounded(v), *a, **kw)
        )
        return TorchDecoder(model, slots=4, slot_tokens=64)

    return make


def read_and_step(decoder: Decoder, *, chunk: int = 64, prompt: int = 20) -> Tensor:
    """The logits after a prompt of `prompt` of IDS, and after each further one."""
    slot = decoder.admit(IDS[:prompt])
    while (logits_V := decoder.prefill([slot], chunk)[0]) is None:
        pass
    seen = [logits_V, *(decoder.step([slot], [token])[0] for token in IDS[prompt:])]
    decoder.free(slot)
    return torch.stack(seen)


@pytest.mark.parametrize("cache", CacheType)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_reference_s(case: str, cache: CacheType, rounded_torch: Any) -> None:
    model = tiny_model(case)
    native = read_and_step(NativeDecoder(model, slots=2, slot_tokens=64, cache=cache))
    expected = read_and_step(rounded_torch(model, cache))
    assert_near(native, expected, most=MOST[cache], mean=MEAN[cache])


def assert_near(native: Tensor, expected: Tensor, *, most: float, mean: float) -> None:
    error = (native - expected).abs()
    assert float(error.max()) < most
    assert float(error.mean()) < mean


def student(case: str, spec: QuantSpec, subln: SubLN = SubLN.NONE, **config: Any) -> Any:
    """A latent student, whose forward pass sees the dequantised weights: the reference."""
    model = tiny_model(case, **config)
    insert_subln(model, subln, gain=0.7)
    quantize_linears(model, spec)
    return model


def packed(model: Any) -> Any:
    """The same student packed, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear) and module.spec is not None:
            weight = pack(quantize(module.weight, module.spec))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PackedLinear(weight, module.bias, norm=module.norm))
    return model.requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("case", "subln", "spec"),
    [
        ("llama-untied", SubLN.NONE, QuantSpec(format=Format.INT2, group_size=16)),
        ("qwen3", SubLN.OUTPUTS, QuantSpec(format=Format.NF3, group_size=16)),
        ("gemma3", SubLN.ALL, QuantSpec(format=Format.INT3, group_size=32)),
        ("qwen2", SubLN.ALL, QuantSpec(format=Format.TERNARY, granularity=Granularity.ROW, group_size=None)),
        ("qwen3", SubLN.ALL, QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None,
                                       activation_bits=8)),
        ("llama", SubLN.OUTPUTS, ALL),
        ("gemma3", SubLN.NONE, ALL),
    ],
)  # fmt: skip
def test_packed_students(case: str, subln: SubLN, spec: QuantSpec, rounded_torch: Any) -> None:
    """Beside dequantised weights; int8 activations may round to the next integer, as the cache may."""
    model = student(case, spec, subln)
    expected = read_and_step(rounded_torch(model, CacheType.FP16))
    native = read_and_step(NativeDecoder(packed(model), slots=2, slot_tokens=64))
    rounds = spec.activation_bits is not None
    assert_near(native, expected, most=5e-2 if rounds else 3e-3, mean=1e-3 if rounds else 2e-4)


def test_weight_only_formats_with_int8_activations_on_request(
    rounded_torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group of a token then has a scale of its own."""
    model = packed(student("llama", replace(ALL, activation_bits=None)))
    native = read_and_step(NativeDecoder(model, slots=2, slot_tokens=64, activation_bits=8))
    monkeypatch.setattr(
        linear,
        "fake_quantize_activation",
        lambda x, bits, **_: fake_quantize_activation(x.unflatten(-1, (-1, 16)), bits).flatten(-2),
    )
    expected = read_and_step(rounded_torch(student("llama", ALL), CacheType.FP16))
    assert_near(native, expected, most=3e-2, mean=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_are_read_as_they_are(dtype: torch.dtype, rounded_torch: Any) -> None:
    model = tiny_model("llama-untied").to(dtype)
    native = read_and_step(NativeDecoder(model, slots=1, slot_tokens=64))
    assert_near(native, read_and_step(rounded_torch(model.float(), CacheType.FP16)), most=1e-3, mean=3e-5)


def test_scaled_rope_is_that_of_transformers(rounded_torch: Any) -> None:
    for rope in (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    ):  # fmt: skip
        model = tiny_model("llama", rope_parameters=rope)
        native = read_and_step(NativeDecoder(model, slots=1, slot_tokens=64))
        assert_near(native, read_and_step(rounded_torch(model, CacheType.FP16)), most=1e-3, mean=3e-5)


@pytest.mark.parametrize("cache", CacheType)
def test_a_sequence_has_the_same_bits_whatever_surrounds_it(cache: CacheType) -> None:
    """Alone or among others, read in chunks of any size, by one thread or three."""
    model = packed(student("gemma3", ALL, SubLN.OUTPUTS))
    texts = []
    for chunk, together, count in ((64, False, 1), (3, False, 1), (7, True, 1), (64, True, 3)):
        set_threads(count)
        decoder = NativeDecoder(model, slots=len(PROMPTS), slot_tokens=64, cache=cache)
        groups = [list(range(len(PROMPTS)))] if together else [[i] for i in range(len(PROMPTS))]
        seen: dict[int, list[Tensor]] = {i: [] for i in range(len(PROMPTS))}
        for group in groups:
            slots = {i: decoder.admit(PROMPTS[i]) for i in group}
            while waiting := [i for i in group if decoder.pending(slots[i])]:
                for i, logits_V in zip(waiting, decoder.prefill([slots[i] for i in waiting], chunk), strict=True):
                    seen[i] += [] if logits_V is None else [logits_V]
            for _ in range(3):
                logits_BV = decoder.step([slots[i] for i in group], [int(seen[i][-1].argmax()) for i in group])
                for i, logits_V in zip(group, logits_BV, strict=True):
                    seen[i].append(logits_V)
        texts.append(torch.stack([torch.stack(seen[i]) for i in seen]))
    assert all(torch.equal(texts[0], other) for other in texts[1:])


@pytest.mark.parametrize("bits", [HeadBits.EIGHT, HeadBits.FOUR])
@pytest.mark.parametrize("case", ["qwen3", "qwen3-untied", "gemma3"])
def test_exported_tables_stay_packed(case: str, bits: HeadBits, tmp_path: Path, rounded_torch: Any) -> None:
    export_packed(student(case, ALL), tiny_tokenizer(), tmp_path / "packed", provenance={}, head_bits=bits)
    model, _ = load_decoder(str(tmp_path / "packed"))
    native = read_and_step(decoder_over(model, slots=1, slot_tokens=64))
    dense, _ = load_packed_model(tmp_path / "packed", kernels=False)
    assert_near(native, read_and_step(rounded_torch(dense, CacheType.FP16)), most=5e-2, mean=1e-3)


@pytest.mark.parametrize("name", instruction_sets()["available"])
def test_every_instruction_set(name: str, rounded_torch: Any) -> None:
    set_instruction_set(name)
    for case, cache, dtype in (("gemma3", CacheType.INT8, torch.float32), ("qwen3", CacheType.FP16, torch.bfloat16),
                               ("llama-untied", CacheType.FP16, torch.float16)):  # fmt: skip
        model = tiny_model(case, hidden_size=36, intermediate_size=76, head_dim=10).to(dtype)  # vectors with a rest
        native = read_and_step(NativeDecoder(model, slots=1, slot_tokens=64, cache=cache))
        expected = read_and_step(rounded_torch(model.float(), cache))
        assert_near(native, expected, most=MOST[cache], mean=MEAN[cache])


def test_a_prompt_longer_than_a_pass_and_a_window(rounded_torch: Any) -> None:
    """Passes hold 256 tokens; a chunk of two prompts is cut where they do."""
    ids = [(7 * i) % VOCAB_SIZE for i in range(200)]
    model = tiny_model("gemma3")
    rounded_torch(model, CacheType.FP16)
    rows = []
    for decoder in (kind(model, slots=2, slot_tokens=256) for kind in (NativeDecoder, TorchDecoder)):
        slots = [decoder.admit(ids), decoder.admit(ids[50:])]
        rows.append(torch.stack([row for row in decoder.prefill(slots, 200) if row is not None]))
    assert_near(*rows, most=1e-3, mean=3e-5)


def test_read_gives_the_logits_of_every_token() -> None:
    decoder = NativeDecoder(tiny_model("llama"), slots=1, slot_tokens=64)
    slot = decoder.admit(IDS)
    read = torch.cat([decoder.read(slot, 9) for _ in range(3)])
    assert (len(read), decoder.pending(slot)) == (len(IDS), 0)
    decoder.free(slot)
    assert torch.equal(read[19:], read_and_step(decoder))


@pytest.mark.parametrize("cache", CacheType)
def test_a_prompt_takes_over_what_another_began_with(cache: CacheType) -> None:
    """From a slot that still runs, by a copy; from a freed one, in place.  The logits are the same bits."""
    decoder = NativeDecoder(tiny_model("qwen3"), slots=3, slot_tokens=64, cache=cache)
    runs = decoder.admit([*IDS[:18], 4, 5])
    decoder.prefill([runs], 64)
    fresh = read_and_step(decoder, prompt=len(IDS))[0]
    copied = decoder.admit(IDS, reuse=64)
    assert decoder.length(copied) == 22  # of the freed slot: all but the last token
    assert torch.equal(decoder.prefill([copied], 64)[0], fresh)  # type: ignore[arg-type]
    other = decoder.admit([*IDS[:18], 9], reuse=17)
    assert decoder.length(other) == 17
    alone = NativeDecoder(tiny_model("qwen3"), slots=1, slot_tokens=64, cache=cache)
    slot = alone.admit([*IDS[:18], 9])
    assert torch.equal(decoder.prefill([other], 64)[0], alone.prefill([slot], 64)[0])  # type: ignore[arg-type]


def test_slots_are_accounted_and_mistakes_are_named() -> None:
    decoder = NativeDecoder(tiny_model("llama"), slots=2, slot_tokens=10_000)
    assert (decoder.slots, decoder.slot_tokens, decoder.capacity, decoder.free_slots) == (2, 256, 512, 2)
    assert (decoder.vocab_size, decoder.device.type, decoder.cache_bytes) == (
        VOCAB_SIZE,
        "cpu",
        2 * 2 * 2 * 2 * 256 * 24,
    )
    with pytest.raises(ModelError, match="no tokens"):
        decoder.admit([])
    with pytest.raises(ModelError, match=f"token {VOCAB_SIZE} is not in a vocabulary"):
        decoder.admit([VOCAB_SIZE])
    with pytest.raises(CapacityError, match="256 tokens leave no room"):
        decoder.admit([1] * 256)
    full, slot = decoder.admit([1] * 255), decoder.admit([1, 2])
    with pytest.raises(CapacityError, match="all 2 slots are taken"):
        decoder.admit([1])
    with pytest.raises(ValueError, match="not ready to step"):
        decoder.step([slot], [1])
    with pytest.raises(ValueError, match="named once"):
        decoder.prefill([slot, slot], 4)
    decoder.prefill([full, slot], 255)
    with pytest.raises(ValueError, match="token -1 is not in"):
        decoder.step([slot], [-1])
    decoder.step([full], [1])
    with pytest.raises(CapacityError, match="holds 256 tokens"):
        decoder.step([full, slot], [1, 1])
    assert decoder.length(slot) == 2


def test_the_library_checks_what_it_is_asked_itself() -> None:
    library = NativeDecoder(tiny_model("llama"), slots=2, slot_tokens=8)._library
    out = torch.empty(1, VOCAB_SIZE)
    for slots, starts, counts, ids, wanted in (
        ([2], [0], [1], [1], [1]),
        ([-1], [0], [1], [1], [1]),
        ([0], [8], [1], [1], [1]),
        ([0], [-1], [1], [1], [1]),
        ([0], [0], [9], [1] * 9, [1]),
        ([0], [0], [1], [VOCAB_SIZE], [1]),
        ([0, 1], [0, 0], [1, 0], [1], [1, 0]),
    ):
        with pytest.raises(KernelError, match="native decoder"):
            library.forward(slots, starts, counts, ids, wanted, out)
    with pytest.raises(KernelError, match="of shape"):
        library.forward([0], [0], [1], [1], [0], out)
    with pytest.raises(KernelError, match="slots 0 and 2"):
        library.copy(0, 2, 1)


def test_weight_only_students_round_their_activations_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_ = QuantSpec(format=Format.INT3, group_size=16)
    export_packed(student("llama", open_), tiny_tokenizer(), tmp_path / "packed", provenance={})
    model, _ = load_decoder(str(tmp_path / "packed"))
    exact, rounded = (read_and_step(decoder_over(model, slots=1, slot_tokens=64, activation_bits=b)) for b in (None, 8))
    by_hand = read_and_step(NativeDecoder(model, slots=1, slot_tokens=64, activation_bits=8))
    assert torch.equal(torch.stack(list(rounded)), torch.stack(list(by_hand)))
    assert not torch.equal(torch.stack(list(rounded)), torch.stack(list(exact)))
    capsys.readouterr()
    decoder_over(tiny_model("llama"), slots=1, slot_tokens=16, activation_bits=8)
    assert "activation_bits=8 has no effect: torch decodes" in capsys.readouterr().err
    export_packed(student("llama", ALL), tiny_tokenizer(), tmp_path / "closed", provenance={}, head_bits=HeadBits.EIGHT)
    closed, _ = load_decoder(str(tmp_path / "closed"))
    decoder_over(closed, slots=1, slot_tokens=16, activation_bits=8)
    assert "activation_bits=8 has no effect: every linear has its own" in capsys.readouterr().err


def test_what_is_chosen_and_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_model("llama")
    assert isinstance(decoder_over(plain, slots=1, slot_tokens=16), TorchDecoder)
    assert why_not_native(plain) == "a model that is not packed"
    export_packed(student("llama", ALL), tiny_tokenizer(), tmp_path / "packed", provenance={})
    model, _ = load_decoder(str(tmp_path / "packed"))
    assert isinstance(decoder_over(model, slots=1, slot_tokens=16), NativeDecoder)
    assert model.dtype is torch.float16
    assert capsys.readouterr().err == ""
    export_packed(student("llama", ALL, hidden_act="relu"), tiny_tokenizer(), tmp_path / "relu", provenance={})
    relu, _ = load_decoder(str(tmp_path / "relu"))
    assert isinstance(decoder_over(relu, slots=1, slot_tokens=16), TorchDecoder)
    assert relu.dtype is torch.float32
    assert "the activation 'relu'. It runs silu, gelu_pytorch_tanh" in capsys.readouterr().err
    with pytest.raises(ModelError, match="a latent quantised linear"):
        NativeDecoder(student("llama", ALL))
    dynamic = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ModelError, match="RoPE of type 'dynamic'"):
        NativeDecoder(dynamic)
