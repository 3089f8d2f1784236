"""A model's context length."""

from __future__ import annotations

from transformers import GPT2Config, MambaConfig

from forgetfilter_callback.data.tokenizers import model_context_length


def test_context_length_of_several_model_families(tmp_path):
    GPT2Config(n_positions=32).save_pretrained(tmp_path / "gpt2")
    MambaConfig().save_pretrained(tmp_path / "mamba")
    assert (model_context_length(str(tmp_path / "gpt2")), model_context_length(str(tmp_path / "mamba"))) == (32, None)
