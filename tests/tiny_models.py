"""Tiny models of several architectures, grouped by whether their prefixes can be reused."""

from __future__ import annotations

import torch
from datasets import Dataset
from helpers import VOCABULARY, tiny_llama, tiny_lora
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from forgetfilter_callback import encode_rows
from forgetfilter_callback.scoring.model_capabilities import can_reuse_prefixes


def reuses_prefixes(model, rows: Dataset) -> bool:
    return can_reuse_prefixes(model, encode_rows(rows))


def prompt_tuned():
    return get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()


def soft_capped(sliding_window: int = 8):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=sliding_window, final_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def sliding_window(sliding_window: int = 6):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=sliding_window,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def soft_capped_below_its_window():
    return soft_capped(sliding_window=64)


def sliding_below_its_window():
    return sliding_window(sliding_window=64)


def eager():
    return tiny_llama(attn_implementation="eager")


def alibi():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()


def state_space():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config).eval()


def local_layers():
    """Its local layers use positions in the sequence, and its window has another name in the configuration."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=6, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    return GPTNeoForCausalLM(config).eval()


def qwen():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    return tiny_llama(
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12, "factor": 4.0, **factors
        }
    )  # fmt: skip


def scaled_logits():
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=0.05,
    )  # fmt: skip
    return GraniteForCausalLM(config).eval()


def unusual_trunk():
    """It calls a submodule of its `base_model`, not the module itself."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def activated_lora():
    """It looks for its invocation tokens once a sequence, so only once a pack."""
    config = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config).eval()


REUSING_MODELS = [
    tiny_llama,
    tiny_lora,
    soft_capped_below_its_window,
    sliding_below_its_window,
    qwen,
    gpt2,
    eager,
]
NOT_REUSING_MODELS = [activated_lora, prompt_tuned, soft_capped, sliding_window, alibi, state_space, local_layers]
