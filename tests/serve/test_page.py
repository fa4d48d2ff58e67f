"""The playground in a real browser, on a desktop and on a phone: what it shows is what the model writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.browser import Tab, chromium, tab
from tests.serve.in_process import CHAT_PROMPT, live
from tests.serve.references import greedy_text, prompt_ids

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no Chromium here: apt-get install chromium-headless-shell"),
]


def send(page: Tab, text: str) -> None:
    page.run(f"$('temperature').value = 0, $('repetition_penalty').value = 1, $('max_tokens').value = 8, "
             f"$('input').value = {text!r}, $('form').requestSubmit()")  # fmt: skip
    page.until("!$('send').disabled && columns.every((c) => c.stats.textContent || c.text.querySelector('.error'))")


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1200, 800), ("phone", 390, 844)])
def test_chat_prompt_and_two_columns(name: str, width: int, height: int, tmp_path: Path) -> None:
    with live() as url, tab(url, tmp_path / "profile", width=width, height=height) as page:
        page.until("columns.length === 1 && models.length === 1")
        send(page, "The dog.")
        assert page.run("columns[0].text.querySelector('.answer').textContent") == greedy_text(
            prompt_ids(CHAT_PROMPT), 8
        )
        stats = page.run("columns[0].stats.textContent")
        assert "8 tokens" in stats
        assert "tokens/s" in stats
        assert "MiB" in stats

        page.run("$('mode').value = 'prompt', $('mode').onchange(), $('beside').value = 'tiny', arrange()")
        send(page, "The quick")
        answers = page.run("columns.map((c) => c.text.querySelector('.answer').textContent)")
        assert answers == [greedy_text(prompt_ids("The quick"), 8)] * 2
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out
        boxes = page.run("columns.map((c) => c.section.getBoundingClientRect().top)")
        assert (boxes[0] == boxes[1]) == (name == "desktop")  # beside each other, or one below the other

        page.screenshot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert {address.startswith(url) for address in page.requested} == {True}
        assert page.complaints == []


def test_a_refusal_is_shown_and_a_stream_can_be_stopped(tmp_path: Path) -> None:
    with live(slot_tokens=256) as url, tab(url, tmp_path / "profile", width=800, height=600) as page:
        page.until("columns.length === 1 && models.length === 1")
        page.run("$('max_tokens').value = 240, $('input').value = 'The dog.', $('form').requestSubmit()")
        page.until("columns[0].text.querySelector('.answer').textContent.length > 3")
        page.run("$('stop').click()")
        page.until("!$('send').disabled && columns[0].stats.textContent.includes('stopped')")
        page.until("fetch('/health').then((a) => a.json()).then((h) => h.running === 0)")
        send(page, "x" * 600)
        assert "maximum context length" in page.run("columns[0].text.querySelector('.error').textContent")
