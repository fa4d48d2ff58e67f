"""What the kernels cannot do is refused by name, before a byte is read."""

import copy
import multiprocessing
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch

from bitdistill_kernels import Weight, instruction_sets, quantize_activation, set_instruction_set, set_threads, threads
from bitdistill_ray.errors import KernelError

N, K = 5, 40
GOOD: dict[str, Any] = {
    "codes": np.zeros((N, 10), np.uint8),
    "scales": np.ones((N, 3), np.float16),
    "zeros": np.zeros((N, 1), np.uint8),
    "format": "int2",
    "shape": (N, K),
    "granularity": "group",
    "group_size": 16,
}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"codes": np.zeros((N, 9), np.uint8)}, "bytes"),
        ({"codes": np.zeros((N, 11), np.uint8)}, "bytes"),
        ({"codes": np.zeros((N, 10), np.int8)}, "uint8"),
        ({"scales": np.ones((N, 2), np.float16)}, "bytes"),
        ({"scales": np.ones((N, 3), np.float64)}, "float16 or float32"),
        ({"zeros": np.zeros((N, 2), np.uint8)}, "bytes"),
        ({"zeros": None}, "int2"),
        ({"format": "ternary"}, "ternary"),
        ({"format": "int5"}, "ternary, int2, int3, nf3, seq2, seq-ternary, lsq3"),
        ({"granularity": "block"}, "tensor, row, group"),
        ({"group_size": None}, "group_size"),
        ({"group_size": 0}, "supported"),
        ({"shape": (0, K)}, "supported"),
        ({"shape": (-1, K)}, "supported"),
        ({"shape": (1, 65537)}, "65536"),
        ({"codes": [0] * 50}, "numpy"),
        ({"codes": torch.zeros(N, 10, dtype=torch.uint8, device="meta")}, "CPU"),
    ],
)
def test_weights(change: dict[str, Any], names: str) -> None:
    assert Weight.create(**GOOD).shape == (N, K)
    with pytest.raises(KernelError, match=names):
        Weight.create(**{**GOOD, **change})


def test_a_ternary_code_of_three() -> None:
    codes = np.zeros((N, 10), np.uint8)
    ternary = {**GOOD, "format": "ternary", "zeros": None}
    assert Weight.create(**{**ternary, "codes": codes}).shape == (N, K)
    codes[4, 9] = 0b11_00_00_00
    with pytest.raises(KernelError, match="a code that the format does not have"):
        Weight.create(**{**ternary, "codes": codes})


def test_products() -> None:
    weight = Weight.create(**GOOD)
    x = np.ones((2, K), np.float32)
    for bad_x in (x[:, 1:], x.astype(np.float64), np.float32(1), [[1.0] * K]):
        with pytest.raises(KernelError, match="x:"):
            weight.matmul(bad_x)
    for bad_bias in (np.ones(N + 1, np.float32), np.ones((1, N), np.float32), np.ones(N)):
        with pytest.raises(KernelError, match="bias"):
            weight.matmul(x, bias=bad_bias)
    for bad_out in (np.empty((2, N + 1), np.float32), np.empty((N, 2), np.float32).T):
        with pytest.raises(KernelError, match="out"):
            weight.matmul(x, out=bad_out)
    with pytest.raises(KernelError, match="Use 8, or None"):
        weight.matmul(x, activation_bits=4)
    with pytest.raises(KernelError, match="x"):
        quantize_activation(np.float32(1))


def test_settings() -> None:
    before = instruction_sets()["chosen"], threads()
    with pytest.raises(KernelError, match="Use one of"):
        set_instruction_set("sse1")
    for count in (0, -1, 100_000):
        with pytest.raises(KernelError, match="threads"):
            set_threads(count)
    assert (instruction_sets()["chosen"], threads()) == before


def test_a_weight_is_not_copied_or_pickled() -> None:
    weight = Weight.create(**GOOD)
    assert copy.deepcopy(weight) is weight
    with pytest.raises(KernelError, match="memory of this process"):
        pickle.dumps(weight)


def _product(weight: Weight, x: np.ndarray) -> np.ndarray:
    return weight.matmul(x)


def _send_product(connection: Any, weight: Weight, x: np.ndarray) -> None:
    connection.send(_product(weight, x))


@pytest.fixture
def large() -> tuple[Weight, np.ndarray]:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (512, 128), dtype=np.uint8)
    weight = Weight.create(codes, np.ones((512, 1), np.float32), format="seq2", shape=(512, 512), granularity="row")
    return weight, random.standard_normal((8, 512), dtype=np.float32)


def test_several_callers_at_once(large: tuple[Weight, np.ndarray]) -> None:
    expected = _product(*large)
    results: list[np.ndarray] = []
    callers = [threading.Thread(target=lambda: results.extend(_product(*large) for _ in range(20))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 80
    assert all(np.array_equal(result, expected) for result in results)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(large: tuple[Weight, np.ndarray]) -> None:
    set_threads(2)
    expected = _product(*large)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_send_product, args=(theirs, *large))
    child.start()
    assert ours.poll(60)
    assert np.array_equal(ours.recv(), expected)
    child.join()
    assert child.exitcode == 0
