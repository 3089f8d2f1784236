"""What a model supports: prefix reuse, padding-free batches, RoPE variants."""

from __future__ import annotations

import pytest
import torch
from helpers import random_rows, rows_with_common_prefixes, tiny_llama
from tiny_models import NOT_REUSING_MODELS, prompt_tuned, reuses_prefixes

from forgetfilter_callback import encode_rows
from forgetfilter_callback.errors import ScoringError
from forgetfilter_callback.scoring import model_capabilities as model_support
from forgetfilter_callback.scoring.token_losses import token_losses


@pytest.mark.parametrize("make_model", NOT_REUSING_MODELS, ids=lambda f: f.__name__)
def test_prefixes_are_not_reused_by_unsupported_models(make_model):
    assert not reuses_prefixes(make_model().eval(), rows_with_common_prefixes())


def test_a_compiled_model_supports_what_the_model_inside_supports():
    for make_model, supported in ((tiny_llama, True), (prompt_tuned, False)):
        model = torch.compile(make_model(), backend="eager")
        assert reuses_prefixes(model, rows_with_common_prefixes()) == supported


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_padding_free(implementation):
    model = tiny_llama()
    model.config._attn_implementation = implementation
    flash = implementation.startswith("flash")
    assert model_support.is_padding_free(model) == flash
    assert reuses_prefixes(model, rows_with_common_prefixes()) == (not flash)


def test_dynamic_rope_beyond_its_context_is_refused():
    model = tiny_llama(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, max_position_embeddings=16
    )
    token_losses(model, encode_rows(random_rows(9, longest=17)), disable_tqdm=True)
    with pytest.raises(ScoringError, match=r"Rows of at least 16 tokens .*dynamic RoPE"):
        token_losses(model, encode_rows(random_rows(9, longest=30)), disable_tqdm=True)
