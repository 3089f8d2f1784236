"""The content of messages: text, parts of text, or null beside tool calls."""

from __future__ import annotations

import copy
import datetime

import pytest
from datasets import Dataset

from forgetfilter_callback import encode_rows
from forgetfilter_callback.errors import EncodingError


START, END = "{% for m in messages %}<{{ m.role }}>", "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PARTS = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
# How chat templates read the content of a message.
TEMPLATES = {
    "text": "{{ m.content }}",
    "trimmed text": "{{ m.content | trim }}",
    "text that is concatenated": "{{ m.content + '' }}",
    "text as JSON unless it is a string": "{% if m.content is string %}{{ m.content }}{% else %}{{ m | tojson }}{% endif %}",
    "text, and nothing else": "{% if m.content is string %}{{ m.content }}{% endif %}",
    "text or parts": "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}",
    "parts": PARTS,
    "parts of the user":
        "{% if m.role == 'user' and m.content is not string %}" + PARTS + "{% else %}{{ m.content }}{% endif %}",
}  # fmt: skip


def part(text):
    return {"type": "text", "text": text}


def chat(tokenizer, content):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = START + content + END
    return copied


def conversation(user, assistant):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "contents",
    [
        ("the cat", "sat"),
        ([part("the cat")], [part("sat")]),
        ([part("the "), part("cat")], [part("s"), part("at")]),
        ("the cat", [part("sat")]),
        ([part("the cat")], "sat"),
    ],
)
def test_text_is_read_as_text_and_parts_as_parts(template, contents, byte_tokenizer):
    """Whatever the chat template reads, it prints the text once."""
    tokenizer = chat(byte_tokenizer, TEMPLATES[template])
    messages = conversation(*contents)
    rows = [{"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}]
    encoded = encode_rows(rows, tokenizer, disable_tqdm=True)
    for index in range(2):
        assert tokenizer.decode(encoded.sample(index)[0]) == "<user>the cat<assistant>sat"
    tokens, loss_mask = encoded.sample(1)
    assert tokenizer.decode(tokens[loss_mask]) == "sat"
    assert rows[0]["messages"] == conversation(*contents)  # unchanged


def test_parts_of_a_dataset_are_passed_as_they_are(byte_tokenizer):
    """A template may treat parts in its own way, here with a line break after each."""
    tokenizer = chat(byte_tokenizer, "{% for part in m.content %}{{ part.text }}|{% endfor %}")
    rows = Dataset.from_list([{"messages": conversation([part("the"), part("cat")], [part("sat")])}])
    assert tokenizer.decode(encode_rows(rows, tokenizer).sample(0)[0]) == "<user>the|cat|<assistant>sat|"


def test_null_beside_tool_calls(byte_tokenizer):
    tokenizer = chat(
        byte_tokenizer, "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{{ m.content }}"
    )
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    expected = tokenizer.apply_chat_template(messages)["input_ids"]
    for rows in ([{"messages": messages}], Dataset.from_list([{"messages": messages}])):
        assert encode_rows(rows, tokenizer).sample(0)[0].tolist() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the content of message 1 in `messages` is missing. Only a message with `tool_calls`"),
        (7, r"must be text or a list of parts, but it is 7 \(int\)"),
        (datetime.datetime(2024, 5, 1), r"but it is datetime.datetime\(2024, 5, 1, 0, 0\) \(datetime\)"),
        ({"text": "hi"}, r"\(dict\)"),
        ([], r"\(list\)"),
        (["hi"], "has the part 'hi'. Only parts of text are supported"),
        ([{"type": "image"}], "has the part {'type': 'image'}"),
        ([{"type": "text", "text": None}], "has the part"),
        ([{"text": "hi"}], "has the part"),
        ("\ud800", "is not valid Unicode text"),
        ([{"type": "text", "text": "\ud800"}], "is not valid Unicode text"),
    ],
)
def test_other_contents_are_refused_with_their_row(content, message, byte_tokenizer):
    tokenizer = chat(byte_tokenizer, TEMPLATES["text or parts"])
    good, bad = {"messages": conversation("a", "b")}, {"messages": conversation("a", content)}
    with pytest.raises(EncodingError, match=rf"Row 1: .*{message}"):
        encode_rows([good, bad], tokenizer, disable_tqdm=True)
    del bad["messages"][1]["content"]
    with pytest.raises(EncodingError, match="Row 0: the content of message 1 in `messages` is missing"):
        encode_rows([bad], tokenizer, disable_tqdm=True)


def test_conversations_with_from_and_value(byte_tokenizer):
    """ShareGPT. The role is `from` as it is."""
    tokenizer = chat(byte_tokenizer, TEMPLATES["text"])
    rows = [{"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "cat", "weight": 1}]}]
    assert tokenizer.decode(encode_rows(rows, tokenizer).sample(0)[0]) == "<human>the<gpt>cat"
    assert rows[0]["conversations"][0] == {"from": "human", "value": "the"}  # unchanged


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        (
            conversation("a", "b"),
            "must be a list of messages with `from` and `value`.* rename the column to `messages`",
        ),
        ("hello", "must be a list of messages"),
        ([], "must be a list of messages"),
        ([{"from": "human", "value": 1}], "the content of message 0 in `conversations` must be text"),
        ([{"from": None, "value": "a"}], "must be a list of messages"),
    ],
)
def test_other_conversations_are_refused(conversations, message, byte_tokenizer):
    with pytest.raises(EncodingError, match=f"Row 0: .*{message}"):
        encode_rows([{"conversations": conversations}], chat(byte_tokenizer, TEMPLATES["text"]), disable_tqdm=True)
