"""The command's refusals, each one line that names what to mend, before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from bitdistill_ray.errors import ServeError
from bitdistill_serve.cli import main
from bitdistill_serve.options import ServeOptions
from tests.serve.references import free_port


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_a_port_in_use_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}" in refusal(capsys, str(tmp_path), "--port", str(port))


def test_values_out_of_range_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refusal(capsys, str(tmp_path), "--slots", "0").startswith("slots: '0'")
    assert refusal(capsys, str(tmp_path), "--threads", "many").startswith("threads: 'many'")


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refusal(capsys, "./no/such/folder", "--port", str(free_port()))


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ServeError, match="'slots'"):
        ServeOptions.parse({"model": "m", "slot": 4})
    with pytest.raises(ServeError, match="model: is not given"):
        ServeOptions.parse({})


def test_options_are_read_from_texts_and_a_local_path_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path)
    options = ServeOptions.parse({"model": "student", "slots": "3"})
    assert (options.model, options.slots, options.served_name) == (str(tmp_path / "student"), 3, "student")
    assert ServeOptions.parse({"model": "org/name"}).served_name == "name"
    assert ServeOptions.parse({"model": "s3://bucket/runs/x/", "name": "mine"}).served_name == "mine"


def test_numbers_may_come_as_words_as_from_a_command_line() -> None:
    options = ServeOptions.parse({"model": "student", "activation_bits": "8", "threads": "2"})
    assert (options.activation_bits, options.threads) == (8, 2)
    with pytest.raises(ServeError, match="activation_bits"):
        ServeOptions.parse({"model": "student", "activation_bits": "4"})
