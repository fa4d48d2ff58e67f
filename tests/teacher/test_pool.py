"""Teachers as real Ray actors: they shake hands, answer in order, and are survived when they die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from bitdistill_ray.config import Dtype
from bitdistill_ray.errors import ModelError, TeacherError
from bitdistill_ray.model.identity import identity, refuse_mismatch
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.actor import Teacher
from bitdistill_ray.teacher.pool import TeacherPool
from tests.teacher.pools import batches, check_answers, client_of, pool_config, process_of
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("teacher"), "llama"))


@pytest.fixture(scope="module")
def pool(source: str, ray_session: None) -> Iterator[TeacherPool]:
    """Two teachers whom nobody kills."""
    started = TeacherPool.start(source, pool_config(2))
    yield started
    started.shutdown()


@pytest.fixture(params=[1, 2])
def mortals(source: str, ray_session: None, request: pytest.FixtureRequest) -> Iterator[TeacherPool]:
    """Teachers for one test: one alone, and one with a colleague."""
    started = TeacherPool.start(source, pool_config(request.param))
    yield started
    started.shutdown()


def test_teachers_shake_hands(pool: TeacherPool, source: str) -> None:
    expected = Teacher(source, dtype=Dtype.FP32, threads=1).handshake()
    assert pool.identity == expected
    assert pool.description == f"{source} on cpu in float32 (as configured), passes plain"
    refuse_mismatch(identity(tiny_model("llama", seed=3), tiny_tokenizer()), pool.identity)


def test_a_student_of_another_vocabulary_is_refused(pool: TeacherPool) -> None:
    student = identity(tiny_model("llama", vocab_size=352), tiny_tokenizer())
    with pytest.raises(TeacherError, match=r"the vocab_size size differs: the student .* has 352, the teacher .* 320"):
        refuse_mismatch(student, pool.identity)


def test_a_student_with_another_tokenizer_is_refused(pool: TeacherPool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(TeacherError, match="the tokenizer hash differs"):
        refuse_mismatch(identity(tiny_model("llama"), tokenizer), pool.identity)


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_is_not_there_is_named_by_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        TeacherPool.start(str(tmp_path / "nothing"), pool_config())
    assert str(tmp_path / "nothing") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_teachers_that_fit_nowhere_are_given_up(source: str) -> None:
    with pytest.raises(TeacherError, match=r"1 x \(99\.0 CPUs, 0 GPUs\) did not start in 3 s\. Lower teacher\.actors"):
        TeacherPool.start(source, pool_config(cpus=99, timeout_s=3))


def test_answers_come_in_the_order_of_the_questions_from_both_teachers(pool: TeacherPool, source: str) -> None:
    client, asked = client_of(pool), batches(6)
    tickets = [client.ask(wire.encode_batch(batch)) for batch in asked]
    assert {ticket.teacher for ticket in tickets} == {0, 1}
    assert client.outstanding == {0: 3, 1: 3}
    check_answers(client, asked, tickets, source)
    assert client.outstanding == {0: 0, 1: 0}
    counters = client.take_counters()
    assert counters["retries"] == 0
    assert counters["teacher_bytes"] == 6 * 2 * 16 * 32 * 4  # batches x rows x tokens x hidden size x fp32
    assert client.take_counters()["teacher_bytes"] == 0


def test_a_question_may_be_a_reference_to_what_is_not_there_yet(pool: TeacherPool, source: str) -> None:
    @ray.remote(num_cpus=0)
    def later(arrays: Any) -> Any:
        time.sleep(0.5)
        return arrays

    client, asked = client_of(pool), batches(2)
    tickets = [client.ask(later.remote(wire.encode_batch(batch))) for batch in asked]
    check_answers(client, asked, tickets, source)


def test_an_answer_is_checked_against_the_question_that_is_open(pool: TeacherPool) -> None:
    client, (first, second) = client_of(pool), batches(2)
    ticket = client.ask(wire.encode_batch(first))
    with pytest.raises(TeacherError, match="a request was mixed up"):
        client.answer(ticket, wire.encode_batch(second))


def test_a_teacher_that_is_killed_costs_no_answer(
    mortals: TeacherPool, source: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With requests under way; where it was the only one, Ray starts it again, the same as before."""
    client, asked = client_of(mortals), batches(8)
    before = process_of(mortals.handles[0])
    os.kill(before, signal.SIGSTOP)  # so that it cannot have answered before it dies
    tickets = [client.ask(wire.encode_batch(batch)) for batch in asked]
    os.kill(before, signal.SIGKILL)
    check_answers(client, asked, tickets, source)
    assert client.take_counters()["retries"] > 0
    assert "teacher 0 was lost" in capfd.readouterr().out
    assert set(client.outstanding.values()) == {0}
    assert process_of(mortals.handles[0]) != before
    assert ray.get(mortals.handles[0].handshake.remote(), timeout=60) == mortals.identity


@pytest.fixture
def stopped(pool: TeacherPool) -> Iterator[TeacherPool]:
    """Teachers whose processes stand still."""
    processes = [process_of(handle) for handle in pool.handles]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    yield pool
    for process in processes:
        os.kill(process, signal.SIGCONT)


def test_silence_is_given_up_after_all_attempts(stopped: TeacherPool) -> None:
    client, [batch] = client_of(stopped, timeout_s=1, attempts=3), batches(1)
    ticket = client.ask(wire.encode_batch(batch))
    with pytest.raises(TeacherError) as refusal:
        client.answer(ticket, wire.encode_batch(batch))
    assert str(refusal.value) == (
        "teacher: teacher 0 gave no answer in 1 s; 3 attempts failed. "
        "See the teachers' logs, or raise teacher.timeout_s"
    )
    assert client.retries == 2


def test_teachers_that_were_silent_answer_again(pool: TeacherPool, source: str) -> None:
    client, asked = client_of(pool), batches(3)
    check_answers(client, asked, [client.ask(wire.encode_batch(batch)) for batch in asked], source)
