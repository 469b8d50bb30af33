"""The table in docs/remote.md of what each dialect can say is what they declare."""

from __future__ import annotations

from pathlib import Path

from headrace.backends.remote.dialects.table import DIALECTS

DOCS = Path(__file__).parents[2] / "docs" / "remote.md"
ROWS = {
    "a text (`text`)": "text",
    "a conversation (`chat`)": "chat.messages.content.text",
    "names of speakers": "chat.messages.name",
    "tools, calls and results": "chat.tools.name",
    "`tool_choice` by mode": "chat.tool_choice.mode",
    "`tool_choice` by name": "chat.tool_choice.name",
    "reasoning of earlier turns": "chat.messages.reasoning_text",
    "`add_generation_prompt`": "chat.add_generation_prompt",
    "`template_arguments`": "chat.template_arguments",
    "`temperature`": "sampling.temperature",
    "`top_p`": "sampling.top_p",
    "`top_k`": "sampling.top_k",
    "`min_p`": "sampling.min_p",
    "`typical_p`": "sampling.typical_p",
    "`presence_penalty`": "sampling.presence_penalty",
    "`frequency_penalty`": "sampling.frequency_penalty",
    "`repetition_penalty`": "sampling.repetition_penalty",
    "`logit_bias`": "sampling.logit_bias",
    "`max_new_tokens`": "stopping.max_new_tokens",
    "`min_new_tokens`": "stopping.min_new_tokens",
    "`stop_sequences`": "stopping.stop_sequences",
    "`include_stop_sequence`": "stopping.include_stop_sequence",
    "`stop_token_ids`": "stopping.stop_token_ids",
    "`ignore_eos`": "stopping.ignore_eos",
    "a JSON schema": "structured_output.json_schema",
    "any JSON object": "structured_output.json_object",
    "a regular expression": "structured_output.regex",
    "one of some texts": "structured_output.choice.texts",
    "`reasoning.enabled`": "reasoning.enabled",
    "`max_reasoning_tokens`": "reasoning.max_reasoning_tokens",
    "`reasoning.include_text`": "reasoning.include_text",
    "`n`, at most": "n",
    "`logprobs`": "response.logprobs",
    "`top_logprobs`, at most": "response.top_logprobs",
    "`token_ids` of the output": "response.token_ids",
    "`seed`": "determinism.seed",
    "`cache.prefix`": "cache.prefix",
}
PARTS = {
    "chat.messages.role",
    "chat.messages.tool_calls.id",
    "chat.messages.tool_calls.name",
    "chat.messages.tool_calls.arguments_json",
    "chat.messages.tool_call_id",
    "chat.tools.description",
    "chat.tools.parameters_json_schema",
}
"""What goes without saying where the row for it is ticked."""


def table() -> str:
    lines = [["", *(f"`{name}`" for name in DIALECTS)], ["---", *(":-:" for _ in DIALECTS)]]
    for label, option in ROWS.items():
        if any(option in dialect.options for dialect in DIALECTS.values()):
            lines.append([label, *(_cell(dialect, option) for dialect in DIALECTS.values())])
    lines.append(["extension", *(_extension(dialect) for dialect in DIALECTS.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(dialect, option: str) -> str:
    if option not in dialect.options:
        return ""
    return {"n": str(dialect.max_n), "response.top_logprobs": str(dialect.max_top_logprobs)}.get(option, "✓")


def _extension(dialect) -> str:
    return "" if dialect.extension is None else ", ".join(f"`{field}`" for field in dialect.extension.model_fields)


def test_the_table_of_capabilities_is_what_the_dialects_declare():
    assert table() in DOCS.read_text(), f"docs/remote.md should have this table:\n{table()}"


def test_the_table_leaves_no_option_out():
    declared = frozenset().union(*(dialect.options for dialect in DIALECTS.values()))
    assert declared - set(ROWS.values()) - PARTS == set()


def test_every_dialect_has_its_place_in_the_docs():
    text = DOCS.read_text()
    for name in DIALECTS:
        assert f"ialect `{name}`" in text, f"docs/remote.md has no section on `{name}`"
