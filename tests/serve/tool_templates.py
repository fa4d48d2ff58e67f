"""Chat templates that take tools, short ones that write calls to the letter as those of the supported families do."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_tokenizer

_BEGIN = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
)
_END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

QWEN3 = (
    _BEGIN
    + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    + "{% for c in m.tool_calls or [] %}{% if not loop.first %}{{ '\\n' }}{% endif %}<tool_call>\n"
    + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    + _END
)
LLAMA3 = (
    _BEGIN
    + "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    + "{% set f = m.tool_calls[0].function %}"
    + '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% endif %}'
    + _END
)
SMOLLM2 = (
    _BEGIN
    + "{% if m.tool_calls %}<tool_call>[{{ '\\n' }}"
    + "{% for c in m.tool_calls %}{% if not loop.first %}{{ ',\\n' }}{% endif %}"
    + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}'
    + "{{ '\\n]' }}</tool_call>{% endif %}"
    + _END
)
TOLD_ONLY = _BEGIN.replace("{% for tool", "Answer in <tool_call></tool_call>.\n{% for tool") + _END
XML = _BEGIN + "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}></function>{% endfor %}" + _END

FAMILIES = {"qwen3": QWEN3, "llama3": LLAMA3, "smollm2": SMOLLM2}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def written(template: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What the template's model answers when it makes these calls."""
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    turns: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    prompt = str(tokenizer_with(template).apply_chat_template(turns, **asked))
    whole = tokenizer_with(template).apply_chat_template(
        [*turns, {"role": "assistant", "content": "", "tool_calls": made}], tokenize=False
    )
    return str(whole).removeprefix(prompt).removeprefix("<think>\n\n</think>\n\n").removesuffix("<|im_end|>\n")
