"""Tools, chat templates that write calls in several forms, and answers with calls."""

from tiny import TEMPLATE

HEAD = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
)
ASSISTANT = (
    "{% if message.tool_calls %}<|im_start|>assistant\n"
    "{% if message.content %}{{ message.content }}\n{% endif %}"
)
TAIL = (
    "<|im_end|>\n{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OBJECT = '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
# As Qwen and Hermes, and as Llama 3: with one call only.
TAGS = (
    HEAD
    + ASSISTANT
    + "{% for call in message.tool_calls %}<tool_call>\n"
    + OBJECT
    + "\n</tool_call>{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    + TAIL
)
BARE = (
    HEAD
    + ASSISTANT
    + "{% if message.tool_calls | length > 1 %}{{ raise_exception('one call only') }}{% endif %}"
    + "{% set call = message.tool_calls[0] %}"
    + OBJECT.replace('arguments":', 'parameters":')
    + TAIL
)
# As older templates of Hermes.
SWAPPED = TAGS.replace(
    OBJECT, '{ "arguments": {{ call.function.arguments | tojson }}, "name": "{{ call.function.name }}"}'
)
# Mistral's list after a control token, and OpenAI's arguments as a text.
CONTROL = TAGS.replace("<tool_call>", "<|im_start|>")
TEXT = TAGS.replace("arguments | tojson }}", "arguments | tojson | tojson }}")
# Without the calls.
SILENT = HEAD + TEMPLATE.partition("%}")[2]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/city"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Köln", "Paris"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
BOTH = [WEATHER, CLOCK]


def call_text(name, arguments, key="arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


CITY = '{"city": "Köln"}'
CALL = f"<tool_call>\n{call_text('weather', CITY)}\n</tool_call>"
CALL_2 = f"<tool_call>\n{call_text('clock', '{}')}\n</tool_call>"


def words(text) -> tuple[str, ...]:
    return tuple(text[at : at + 5] for at in range(0, len(text), 5))
