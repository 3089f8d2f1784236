"""Check the messages of a row, and give their content the form that the chat template reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import EncodingError


Message = dict[str, Any]
# The form of a message's content: one text, a list of parts such as `{"type": "text", "text": "hi"}`, or no content.
Form = Literal["text", "parts", "none"]

# A word that no chat template prints by itself.
_PROBE = "forgetfilterprobe"


def check_messages(messages: Any, column: str) -> list[Message]:
    """Check that `messages` is a list of messages with a `role` and a `content` that is text.

    The content is a string, a list of text parts, or null beside `tool_calls`.

    Raises:
        EncodingError: if it is anything else.
    """
    is_message_list = isinstance(messages, list) and bool(messages)
    if not is_message_list or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages
    ):
        text_or = "text or " if column in ("prompt", "completion") else ""
        raise EncodingError(
            f"`{column}` must be {text_or}a list of messages with `role` and `content`, but it is {messages!r:.60}."
        )
    for index, message in enumerate(messages):
        _check_content(message, f"the content of message {index} in `{column}`")
    return messages


def check_text(text: str, name: str) -> str:
    """Check that `text` is valid Unicode.

    Raises:
        EncodingError: if it contains a part of a character (a lone surrogate).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EncodingError(
            f"{name} is not valid Unicode text ({error.reason} at position {error.start}). Repair or remove the row."
        ) from error
    return text


def messages_from_sharegpt(conversations: Any) -> list[Message]:
    """Convert messages with `from` and `value` to `role` and `content`, as TRL does. The role is not translated.

    Raises:
        EncodingError: if a message does not have both keys.
    """
    if not isinstance(conversations, list) or not all(
        isinstance(message, Mapping) and {"from", "value"} <= message.keys() for message in conversations
    ):
        raise EncodingError(
            "`conversations` must be a list of messages with `from` and `value`, but it is "
            f"{conversations!r:.60}. If its messages have `role` and `content`, rename the column to `messages`."
        )
    names = {"from": "role", "value": "content"}
    return [{names.get(key, key): value for key, value in message.items()} for message in conversations]


def fit_content(messages: list[Message], form: Form | None) -> list[Message]:
    """Convert the content of all messages to `form`: to text (the parts are joined), or to parts."""
    if form is None:
        return messages
    if form == "text":
        return [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            if _form(message) == "parts"
            else message
            for message in messages
        ]
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if _form(message) == "text" else message
        for message in messages
    ]


def forms_of(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, Form], ...]:
    """The role and the form of the content of each message."""
    return tuple((message["role"], _form(message)) for message in messages)


def readable_form(
    processing_class: PreTrainedTokenizerBase, chat_template: str | None, forms: tuple[tuple[str, Form], ...]
) -> Form | None:
    """Return the form that the content of messages must have for the chat template, or `None` to pass it as it is.

    Some chat templates read text only: a list of parts would be printed as Python code. Others read parts only: text
    would disappear. This renders a conversation of the same roles to see whether each content is printed as text.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        chat_template (`str`, *optional*):
            A chat template that replaces the tokenizer's own.
        forms (`tuple`):
            The roles and the forms of the messages, from [`forms_of`].
    """

    def prints_text(wanted: Form | None) -> bool:
        words = [f"{_PROBE}{index}." for index in range(len(forms))]
        conversation: list[Message] = []
        for word, (role, form) in zip(words, forms, strict=True):
            conversation.append({"role": role, "content": word})
            if (wanted or form) == "parts":
                conversation[-1]["content"] = [{"type": "text", "text": word}]
        try:
            text = str(processing_class.apply_chat_template(conversation, tokenize=False, chat_template=chat_template))
        except (TemplateError, TypeError, ValueError):
            return False
        return all(word in text and f"'{word}'" not in text and f'"{word}"' not in text for word in words)

    if prints_text(None):
        return None
    if prints_text("text"):
        return "text"
    if prints_text("parts"):
        return "parts"
    return "text"  # a template that the conversation above does not suit


def _form(message: Mapping[str, Any]) -> Form:
    content = message.get("content")
    if content is None:
        return "none"
    return "text" if isinstance(content, str) else "parts"


def _check_content(message: Mapping[str, Any], name: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        check_text(content, name)
    elif content is None:
        if not message.get("tool_calls"):
            raise EncodingError(f"{name} is missing. Only a message with `tool_calls` may have no content.")
    elif isinstance(content, list) and content:
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise EncodingError(
                    f"{name} has the part {part!r:.60}. Only parts of text are supported: "
                    '{"type": "text", "text": "..."}.'
                )
            check_text(part["text"], name)
    else:
        raise EncodingError(
            f"{name} must be text or a list of parts, but it is {content!r:.60} ({type(content).__name__})."
        )
