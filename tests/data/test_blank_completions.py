"""Finding samples with an empty completion."""

from __future__ import annotations

import copy
import logging

import pytest
from shipped_tokenizers import shipped_tokenizer

from forgetfilter_callback import encode_rows
from forgetfilter_callback.data import encoded_rows
from forgetfilter_callback.data.blank_completions import describe_blank_completions, find_blank_completions
from forgetfilter_callback.data.load_rows import encode_source, warn_about_rows


BLANK = ["", " ", "\n\n", "\t \u3000"]
NOT_BLANK = ["a", " .", "\u3042", "\N{GRINNING FACE}", "the cat"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pairs(completions):
    return [{"prompt": "the dog", "completion": completion} for completion in completions]


def as_messages(rows):
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    return [
        {"prompt": [{**user, "content": row["prompt"]}], "completion": [{**assistant, "content": row["completion"]}]}
        for row in rows
    ]


@pytest.mark.parametrize("form", [list, as_messages])
def test_empty_and_white_completions_are_found(form, byte_tokenizer):
    """As text and as messages, whose template ends a turn with a special token and a line break."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    found = [
        find_blank_completions(encode_rows(form(pairs(completions)), tokenizer, disable_tqdm=True), tokenizer).tolist()
        for completions in (BLANK, NOT_BLANK, [*NOT_BLANK, *BLANK])
    ]
    assert found == [[0, 1, 2, 3], [], [5, 6, 7, 8]]


def test_rows_of_token_ids_are_found_too(tokenizer):
    """Unknown tokens, and tokens that the tokenizer does not have, are not empty. Rows without a label are left out."""
    eos, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    rows = encode_rows(
        [
            {"input_ids": [5, 6, eos], "labels": [-100, -100, eos]},
            {"input_ids": [5, 6, unknown], "labels": [-100, -100, unknown]},
            {"input_ids": [5, 6, 4000], "labels": [-100, -100, 4000]},
            {"input_ids": [5, 6, eos], "labels": [-100, -100, -100]},
            {"input_ids": []},
        ],
        disable_tqdm=True,
    )
    assert find_blank_completions(rows, tokenizer).tolist() == [0]


def test_an_unknown_token_that_is_the_end_token_is_no_text():
    """GPT-2 has one special token, which is both."""
    tokenizer = shipped_tokenizer("no pad, as GPT-2")
    assert tokenizer.unk_token_id == tokenizer.eos_token_id
    rows = encode_rows(pairs([*BLANK, *NOT_BLANK]), tokenizer, disable_tqdm=True)
    assert find_blank_completions(rows, tokenizer).tolist() == [0, 1, 2, 3]


def test_rows_are_numbered_across_windows(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(encoded_rows, "WINDOW", 2)
    rows = encode_rows(pairs(["a", "b", "", "c", "d", " ", ""]), byte_tokenizer, disable_tqdm=True)
    assert find_blank_completions(rows, byte_tokenizer).tolist() == [2, 5, 6]


def test_a_file_with_empty_completions_is_reported(byte_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode_source("noisy.csv", pairs(["", "a", " "]), byte_tokenizer, None)
        warn_about_rows("noisy.csv", rows, byte_tokenizer)
    assert "noisy.csv: 2 of 3 rows have a completion that is empty or only white space (rows 0, 2), so" in caplog.text
    caplog.clear()
    rows = encode_source("noisy.csv", pairs(["b", "a"]), byte_tokenizer, None)
    warn_about_rows("noisy.csv", rows, byte_tokenizer)
    assert not caplog.text and describe_blank_completions(rows, byte_tokenizer) is None
