"""Tokenizers with the special tokens that those of well-known models have when they are loaded."""

from __future__ import annotations

import copy

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = ["<eos>", "<bos>", "<pad>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{end}{{% endfor %}}"
    "{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
)


def _without_bos() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    raw.train_from_iterator(["the cat sat on the mat and the dog ran"] * 3, trainer)
    return raw


def _with_bos() -> Tokenizer:
    raw = _without_bos()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return raw


# Name → the raw tokenizer, its settings, and the end of a turn in its chat template.
SHIPPED = {
    "no pad, as GPT-2": (_without_bos, dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<eos>"), "<eos>"),
    "no pad, with bos, as Llama 2": (_with_bos, {"eos_token": "<eos>", "bos_token": "<bos>"}, "<eos>"),
    "pad is eos": (_without_bos, {"eos_token": "<eos>", "pad_token": "<eos>"}, "<eos>"),
    "own pad, no bos, as Qwen": (_without_bos, {"eos_token": "<end>", "pad_token": "<pad>"}, "<end>\n"),
    "padded on the left": (_without_bos, {"eos_token": "<eos>", "pad_token": "<pad>", "padding_side": "left"}, "<eos>"),
    "turns end with another token, as Llama 3": (_with_bos, {"eos_token": "<eos>", "bos_token": "<bos>"}, "<end>"),
    "eos in the template only": (_without_bos, {}, "<end>"),
}


def shipped_tokenizer(name: str) -> PreTrainedTokenizerFast:
    raw, settings, end = SHIPPED[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw(), extra_special_tokens=["<end>", "<user>", "<assistant>"], **settings
    )
    tokenizer.chat_template = TEMPLATE.format(end=end)
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {**copy.deepcopy(tokenizer.special_tokens_map), "padding_side": tokenizer.padding_side}
