"""`score_checkpoints` in Python: how the rows were encoded, and arguments that are not valid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import texts, tiny_llama
from transformers import LlamaForCausalLM

from forgetfilter_callback import FilterConfig, encode_rows, score_checkpoints, to_dataset
from forgetfilter_callback.pipeline import checkpoints as checkpoints_module


@pytest.fixture
def after(tmp_path, byte_tokenizer) -> str:
    tiny_llama(seed=1, vocab_size=len(byte_tokenizer)).save_pretrained(tmp_path / "after")
    return str(tmp_path / "after")


def mean_of_all_tokens(model, tokenizer, row, max_length) -> float:
    """Transformers' own loss of the prompt and the completion, as one text."""
    tokens = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"][:max_length]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([tokens]), labels=torch.tensor([tokens])).loss)


@pytest.mark.parametrize("max_length", [None, 10])
def test_the_trace_stores_how_the_rows_were_encoded(max_length, files, after, tmp_path, byte_tokenizer):
    given = texts(12, seed=1)
    rows = encode_rows(given, byte_tokenizer, max_length, disable_tqdm=True, completion_only_loss=False)
    models = {"before": str(files["model"]), "after": after}
    trace = score_checkpoints(tmp_path / "trace", rows, byte_tokenizer, models, disable_tqdm=True)
    dataset = to_dataset(trace, given[::-1], FilterConfig("loss"), byte_tokenizer)  # encodes the rows again
    model = tiny_llama(seed=1, vocab_size=len(byte_tokenizer))
    expected = [mean_of_all_tokens(model, byte_tokenizer, row, max_length) for row in given[::-1]]
    np.testing.assert_allclose(dataset["forgetfilter_loss_safety"][:], expected, rtol=1e-5)
    assert trace.manifest["max_length"] == rows.select([0]).max_length == max_length
    assert trace.rows.encoding == rows.select([0]).encoding == rows.encoding


def test_wrong_arguments_are_refused_before_anything_is_loaded(files, tmp_path, byte_tokenizer, monkeypatch):
    def fail(*arguments: object) -> None:
        raise AssertionError("a model or the rows were loaded")

    monkeypatch.setattr(checkpoints_module, "_load", fail)
    monkeypatch.setattr(checkpoints_module, "load_rows", fail)
    rows = encode_rows(texts(3, seed=1), byte_tokenizer, 20, disable_tqdm=True)
    model = {"before": str(files["model"])}
    for wrong, message in (
        ({"checkpoints": {}}, "`checkpoints` must map 'before', 'after' or 'base' to models, but it has no models"),
        ({"checkpoints": {**model, "noisy": "m"}}, "but it has 'before', 'noisy'"),
        ({"checkpoints": "m"}, "but it has str"),
        ({"checkpoints": {"before": tiny_llama()}}, r"checkpoints\['before'\] must be a Hub id or a folder as text"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be a whole number of at least 1"),
        (
            {"rows": texts(3, seed=1)},
            r"`rows` must be EncodedRows, but it is list\. Pass `encode_rows\(rows, tokenizer\)`",
        ),
        ({"tokenizer": "gpt2"}, "`tokenizer` must be a `PreTrainedTokenizerBase`, but it is str"),
    ):
        arguments = {"rows": rows, "tokenizer": byte_tokenizer, "checkpoints": model, **wrong}
        is_object = wrong.keys() <= {"rows", "tokenizer"}  # the others are settings
        with pytest.raises(TypeError if is_object else ValueError, match=message):
            score_checkpoints(tmp_path / "trace", **arguments)
        if not is_object:
            of_source = {name: value for name, value in arguments.items() if name not in ("rows", "tokenizer")}
            with pytest.raises(ValueError, match=message):
                checkpoints_module.score_source(tmp_path / "trace", str(files["noisy"]), **of_source)
    assert not (tmp_path / "trace").exists()


def test_a_model_without_hidden_states_is_reported(files, byte_tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda model: None)
    checkpoints = {role: str(files["model"]) for role in ("base", "before", "after")}
    rows = encode_rows(texts(6, seed=1), byte_tokenizer, disable_tqdm=True)
    score_checkpoints(tmp_path / "trace", rows, byte_tokenizer, checkpoints, disable_tqdm=True)
    assert caplog.text.count("there are no hidden states. The measures combined") == 1
