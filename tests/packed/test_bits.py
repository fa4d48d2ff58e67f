"""The canonical bytes: fixed by worked examples and by a loop that follows the words of docs/FORMAT.md."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill_ray.errors import PackedError
from bitdistill_ray.packed.bits import pack_codes, packed_row_bytes, unpack_codes
from bitdistill_ray.packed.trits import pack_trits, trit_row_bytes, unpack_trits


def packed_by_the_letter(codes: list[int], bits: int) -> list[int]:
    """One row, bit by bit: a 2-bit plane, then for 3 bits a 1-bit plane, each padded to whole bytes; nibbles; bytes."""
    if bits == 8:
        return codes
    if bits == 4:
        return [low | high << 4 for low, high in zip(codes[::2], [*codes[1::2], 0], strict=False)]
    low = [0] * -(-len(codes) // 4)
    for k, code in enumerate(codes):
        low[k // 4] |= (code & 3) << 2 * (k % 4)
    high = [0] * (-(-len(codes) // 8) if bits == 3 else 0)
    for k, code in enumerate(codes):
        if bits == 3:
            high[k // 8] |= (code >> 2) << (k % 8)
    return low + high


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    rows, n = draw(st.integers(0, 4)), draw(st.integers(0, 40))
    codes = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * n, max_size=rows * n))
    return torch.tensor(codes, dtype=torch.uint8).reshape(rows, n), bits


@given(code_matrices())
@settings(max_examples=150, deadline=None)
def test_packing_follows_the_letter_and_unpacking_undoes_it(matrix: tuple[torch.Tensor, int]) -> None:
    codes, bits = matrix
    packed = pack_codes(codes, bits)
    assert packed.shape == (codes.shape[0], packed_row_bytes(codes.shape[1], bits))
    assert packed.tolist() == [packed_by_the_letter(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_codes(packed, codes.shape[1], bits), codes)


def test_worked_examples() -> None:
    assert pack_codes(torch.tensor([[0, 1, 2, 3, 2]], dtype=torch.uint8), 2).tolist() == [[0b11_10_01_00, 0b10]]
    assert pack_codes(torch.tensor([[1, 15, 9]], dtype=torch.uint8), 4).tolist() == [[0xF1, 0x09]]
    assert pack_codes(torch.tensor([[1, 255]], dtype=torch.uint8), 8).tolist() == [[1, 255]]
    three = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 7]], dtype=torch.uint8)
    assert pack_codes(three, 3).tolist() == [[0b11_10_01_00, 0b11_10_01_00, 0b11, 0b11110000, 0b1]]


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        (torch.tensor([[4]], dtype=torch.uint8), 2),
        (torch.tensor([[8]], dtype=torch.uint8), 3),
        (torch.tensor([[1]], dtype=torch.int64), 2),
        (torch.tensor([1], dtype=torch.uint8), 2),
        (torch.tensor([[16]], dtype=torch.uint8), 4),
        (torch.tensor([[1]], dtype=torch.uint8), 5),
    ],
)
def test_what_does_not_fit_is_refused(codes: torch.Tensor, bits: int) -> None:
    with pytest.raises(PackedError):
        pack_codes(codes, bits)


@pytest.mark.parametrize("n", [8, 13])
def test_bytes_of_another_length_are_refused(n: int) -> None:
    packed = pack_codes(torch.zeros(2, 9, dtype=torch.uint8), 2)
    with pytest.raises(PackedError, match=r"\[rows, \d+\]"):
        unpack_codes(packed, n, 2)


@given(st.integers(0, 4), st.integers(0, 23), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_trits_follow_the_letter_and_come_back(rows: int, n: int, random: Random) -> None:
    codes = [[random.randrange(3) for _ in range(n)] for _ in range(rows)]
    packed = pack_trits(torch.tensor(codes, dtype=torch.uint8).reshape(rows, n))
    by_the_letter = [[sum(c * 3**i for i, c in enumerate(row[k : k + 5])) for k in range(0, n, 5)] for row in codes]
    assert packed.shape == (rows, trit_row_bytes(n))
    assert packed.tolist() == by_the_letter
    assert unpack_trits(packed, n).tolist() == codes


@pytest.mark.parametrize(
    ("byte", "n", "what"),
    [(243, 5, "at most 242"), (255, 5, "at most 242"), (81, 4, "behind the end"), (0, 6, r"\[rows, 2\]")],
)
def test_bytes_that_are_no_trits_are_refused(byte: int, n: int, what: str) -> None:
    with pytest.raises(PackedError, match=what):
        unpack_trits(torch.tensor([[byte]], dtype=torch.uint8), n)


def test_codes_that_are_no_trits_are_refused() -> None:
    with pytest.raises(PackedError, match="code 3"):
        pack_trits(torch.tensor([[3]], dtype=torch.uint8))
