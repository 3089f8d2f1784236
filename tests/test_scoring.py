"""Per-token losses against a plain one-row reference, and their invariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, random_rows, tiny_llama, tiny_lora
from datasets import Dataset
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
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from forgetfilter_callback import encode_rows
from forgetfilter_callback.errors import ScoringError
from forgetfilter_callback.scoring import token_losses as scoring
from forgetfilter_callback.scoring.model_support import can_reuse_prefixes
from forgetfilter_callback.scoring.packing import plan_packs
from forgetfilter_callback.scoring.token_losses import token_losses
from forgetfilter_callback.utils.model_state import preserve_state


def reference_losses(model, rows) -> np.ndarray:
    """One row at a time, full logits, log-softmax written out."""
    losses = []
    for row in rows:
        tokens = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, -tokens.shape[1] :].double()
        for place in range(1, tokens.shape[1]):
            if row["labels"][place] != -100:
                target = row["labels"][place]
                losses.append(torch.logsumexp(logits[place - 1], -1) - logits[place - 1, target])
    return np.array(losses)


def rows_that_begin_alike(count: int = 40, seed: int = 3) -> Dataset:
    """One beginning for all, two more for half of them each, duplicates, and rows that are the beginning of others."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(5, VOCABULARY, n).tolist()  # noqa: E731
    template, passages = draw(6), [draw(9), draw(5)]
    rows = []
    for index in range(count):
        tokens = template + passages[index % 2] + draw(int(rng.integers(1, 8)))
        masked = int(rng.integers(0, len(tokens) - 1))
        rows.append({"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]})
    rows += [rows[0], {"input_ids": template + passages[0], "labels": template + passages[0]}]
    rows.append({**rows[3], "labels": rows[3]["input_ids"]})  # the same text, other tokens count
    rows.append({**rows[4], "labels": [*rows[4]["input_ids"][:8], *[-100] * (len(rows[4]["input_ids"]) - 8)]})
    return Dataset.from_list([rows[index] for index in rng.permutation(len(rows))])


def shares(model, rows: Dataset) -> bool:
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
    """Its local layers go by places in the sequence, and its window goes by another name."""
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


SHARING = [
    tiny_llama,
    tiny_lora,
    soft_capped_below_its_window,
    sliding_below_its_window,
    qwen,
    gpt2,
    eager,
]


def activated_lora():
    """It looks for its invocation once a sequence, so once a pack."""
    config = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config).eval()


NOT_SHARING = [activated_lora, prompt_tuned, soft_capped, sliding_window, alibi, state_space, local_layers]


@pytest.mark.parametrize("make_rows", [random_rows, rows_that_begin_alike], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make_model", [*SHARING, *NOT_SHARING], ids=lambda f: f.__name__)
def test_losses_equal_the_one_row_reference(make_model, make_rows):
    model, rows = make_model(), make_rows(17)
    losses = token_losses(model.eval(), encode_rows(rows), batch_tokens=64, disable_tqdm=True)
    np.testing.assert_allclose(losses, reference_losses(model, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make_model", SHARING, ids=lambda f: f.__name__)
def test_prefixes_are_shared_where_the_model_can(make_model, monkeypatch):
    model, rows = make_model().eval(), rows_that_begin_alike()
    assert shares(model, rows)
    read = 0
    forward = model.forward

    def counting_forward(*args, **kwargs):
        nonlocal read
        read += kwargs["input_ids"].numel()
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting_forward)
    losses = token_losses(model, encode_rows(rows), batch_tokens=256, disable_tqdm=True)
    assert read < 0.6 * sum(len(row["input_ids"]) for row in rows)
    np.testing.assert_allclose(losses, reference_losses(model, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make_model", NOT_SHARING, ids=lambda f: f.__name__)
def test_prefixes_are_not_shared_where_the_model_cannot(make_model):
    assert not shares(make_model().eval(), rows_that_begin_alike())


PADDING_FREE = [tiny_llama, tiny_lora, sliding_window, qwen, gpt2]


@pytest.mark.parametrize("make_model", PADDING_FREE, ids=lambda f: f.__name__)
def test_rows_one_after_another_without_padding(make_model, monkeypatch):
    """The inputs that flash attention gets. `sdpa` reads them too (slower: it masks what flash attention leaves out)."""
    model, rows = make_model().eval(), random_rows(17)
    monkeypatch.setattr(scoring, "can_share_prefixes", lambda model, rows: False)
    monkeypatch.setattr(scoring, "_is_padding_free", scoring._takes_own_positions)
    forward, read = model.forward, []

    def counting_forward(*args, **kwargs):
        assert "attention_mask" not in kwargs
        read.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting_forward)
    losses = token_losses(model, encode_rows(rows), batch_tokens=128, disable_tqdm=True)
    last_counted = [max(i for i, label in enumerate(row["labels"]) if label != -100) for row in rows]
    assert {batch for batch, _ in read} == {1} and sum(length for _, length in read) == sum(last_counted)
    monkeypatch.setattr(model, "forward", forward)
    np.testing.assert_allclose(losses, reference_losses(model, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flash_attention_3"])
def test_padding_goes_where_attention_is_flash(implementation):
    model = tiny_llama()
    model.config._attn_implementation = implementation
    flash = implementation.startswith("flash")
    assert scoring._is_padding_free(model) == flash
    assert shares(model, rows_that_begin_alike()) == (not flash)


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    return tiny_llama(
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12, "factor": 4.0, **factors
        }
    )  # fmt: skip


def test_longrope_scales_each_row_by_its_own_length():
    model, rows = longrope(), random_rows(30)
    assert shares(model, random_rows(9, longest=12)) and not shares(model, rows)
    losses = token_losses(model, encode_rows(rows), disable_tqdm=True)
    # The reference reads the last token too, which nothing is predicted from.
    last = [max(i for i, label in enumerate(row["labels"]) if label != -100) for row in rows]
    assert min(last) < 12 < max(last)
    expected = []
    for row, end in zip(rows, last, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"][:end]])).logits[0].log_softmax(-1)
        expected += [-logits[i - 1, label] for i, label in enumerate(row["labels"]) if i and label != -100]
    np.testing.assert_allclose(losses, np.array(expected), rtol=1e-5, atol=1e-6)


def test_virtual_tokens_count_where_longrope_changes():
    model = get_peft_model(longrope(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    rows = encode_rows(random_rows(30))
    alone = token_losses(model, rows, batch_tokens=1, disable_tqdm=True)
    np.testing.assert_allclose(token_losses(model, rows, disable_tqdm=True), alone, rtol=1e-5, atol=1e-6)


def test_untouched_restores_longrope_which_overwrites_its_buffers():
    model = longrope()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attributes = set(vars(model.model.rotary_emb))
    with preserve_state(model):
        model(input_ids=torch.arange(5, 45)[None])
        assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert set(vars(model.model.rotary_emb)) == attributes


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_logits_of_a_batch_stay_within_their_bound(reuse_prefixes, monkeypatch):
    rng = np.random.default_rng(0)
    start = rng.integers(5, VOCABULARY, 20).tolist()
    rows = []
    for _ in range(60):
        tokens = start + rng.integers(5, VOCABULARY, 8).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * 20 + tokens[20:]})
    model, sizes = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    token_losses(model, encode_rows(rows), batch_tokens=256, reuse_prefixes=reuse_prefixes, disable_tqdm=True)
    assert sum(sizes) > 400 and max(sizes) <= 64


def test_no_rows_have_no_losses():
    rows = encode_rows(random_rows(3)).select([])
    assert token_losses(tiny_llama(), rows, disable_tqdm=True).shape == (0,)


def test_dynamic_rope_beyond_its_context_is_refused():
    model = tiny_llama(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, max_position_embeddings=16
    )
    token_losses(model, encode_rows(random_rows(9, longest=17)), disable_tqdm=True)
    with pytest.raises(ScoringError, match=r"rows reach the 16 tokens .* dynamic RoPE"):
        token_losses(model, encode_rows(random_rows(9, longest=30)), disable_tqdm=True)


def test_windows_give_what_one_pass_gives(monkeypatch):
    model, rows = tiny_llama(), rows_that_begin_alike()
    whole = encode_rows(rows)
    expected, fingerprint = token_losses(model, whole, disable_tqdm=True), whole.fingerprint
    monkeypatch.setattr(encoding, "WINDOW", 7)
    windows = encode_rows(rows)
    assert len(list(windows.windows())) == 7
    assert windows.ids == whole.ids and windows.fingerprint == fingerprint
    np.testing.assert_allclose(token_losses(model, windows, disable_tqdm=True), expected, rtol=1e-5, atol=1e-6)


def test_packs_stay_within_their_bound():
    rows = encode_rows(rows_that_begin_alike())
    packs = plan_packs(rows, longest=50)
    assert max(pack.length for pack in packs) <= 50 < plan_packs(rows, longest=1000)[0].length
    assert sorted(row for pack in packs for row in pack.rows) == list(range(len(rows)))


def test_a_model_without_an_output_head_to_hook_is_scored_from_full_logits():
    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()
            self.config = self.inner.config

        def get_output_embeddings(self):
            return None

        def forward(self, **inputs):
            return self.inner(**inputs)

    rows = random_rows(9)
    losses = token_losses(Hidden().eval(), encode_rows(rows), disable_tqdm=True)
    np.testing.assert_allclose(losses, reference_losses(tiny_llama(), rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 37, 4096])
def test_losses_do_not_depend_on_the_batch(batch_tokens):
    model, rows = tiny_lora(), encode_rows(random_rows(17))
    losses = token_losses(model, rows, batch_tokens=batch_tokens, disable_tqdm=True)
    np.testing.assert_allclose(losses, token_losses(model, rows, disable_tqdm=True), rtol=1e-5, atol=1e-6)


def test_losses_go_with_the_rows_in_any_order():
    model, rows = tiny_llama(), encode_rows(random_rows(17))
    order = np.random.default_rng(0).permutation(len(rows))
    losses = np.split(token_losses(model, rows, disable_tqdm=True), rows.loss_offsets[1:-1])
    shuffled = rows.select(order)
    again = np.split(token_losses(model, shuffled, disable_tqdm=True), shuffled.loss_offsets[1:-1])
    for place, index in enumerate(order):
        np.testing.assert_allclose(again[place], losses[index], rtol=1e-5, atol=1e-6)


def test_bfloat16_losses_stay_near_those_of_one_row():
    """A bound for this small model; the README gives what a real one does. With a wrong mask it is .3."""
    model, rows = tiny_llama(), encode_rows(rows_that_begin_alike())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.bfloat16()
    one_row = token_losses(model, rows, batch_tokens=1, reuse_prefixes=False, disable_tqdm=True)
    shared = token_losses(model, rows, batch_tokens=4096, disable_tqdm=True)
    starts = rows.loss_offsets[:-1]
    difference = np.add.reduceat(shared - one_row, starts) / np.diff(rows.loss_offsets)
    assert 0 < np.abs(difference).max() < 0.02


def test_out_of_memory_halves_the_batch(monkeypatch):
    model, rows = tiny_llama(), encode_rows(random_rows(17))
    expected = token_losses(model, rows, disable_tqdm=True)
    forward, sizes = model.forward, []

    def forward_that_fits_three(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("no memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward_that_fits_three)
    losses = token_losses(model, rows, reuse_prefixes=False, disable_tqdm=True)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    assert max(sizes) == 17


def test_out_of_memory_splits_a_pack(monkeypatch):
    model, rows = tiny_llama(), encode_rows(rows_that_begin_alike())
    expected = token_losses(model, rows, reuse_prefixes=False, disable_tqdm=True)
    forward, lengths = model.forward, []

    def forward_that_fits_forty(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        if lengths[-1] > 40:
            raise torch.OutOfMemoryError("no memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward_that_fits_forty)
    np.testing.assert_allclose(token_losses(model, rows, disable_tqdm=True), expected, rtol=1e-5, atol=1e-6)
    assert max(lengths) > 80


def test_untouched_restores_modes_buffers_numbers_and_generators():
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    with preserve_state(model):
        torch.rand(7)
        np.random.rand(7)
        model(input_ids=torch.arange(5, 105)[None])
        assert model.model.rotary_emb.max_seq_len_cached == 100  # it did grow inside
    assert [module.training for module in model.modules()] == modes
    assert model.model.rotary_emb.max_seq_len_cached == 64
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert (torch.rand(1), np.random.rand()) == expected


def test_untouched_restores_dynamic_rope_that_training_has_grown():
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    model(input_ids=torch.arange(5, 85)[None])
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with preserve_state(model):
        model(input_ids=torch.arange(5, 105)[None])
        assert model.model.rotary_emb.max_seq_len_cached == 100
    assert model.model.rotary_emb.max_seq_len_cached == 80
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("size", [512, 8])
def test_states_are_the_mean_hidden_states_that_predict_a_row(size, reuse_prefixes, monkeypatch):
    monkeypatch.setattr(scoring, "STATE_SIZE", size)
    scoring._projection.cache_clear()
    dataset = rows_that_begin_alike()
    uncounted = {"input_ids": [9, 8, 7], "labels": [-100] * 3}
    rows = encode_rows([*dataset, uncounted], disable_tqdm=True)
    model = tiny_llama()
    with preserve_state(model):
        (scored,) = scoring.window_scores(model, rows, 64, reuse_prefixes, disable_tqdm=True, with_states=True)
    expected = np.zeros((len(rows), 32), np.float32)
    for index, row in enumerate(dataset):
        with torch.no_grad():
            hidden = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
        places = [place - 1 for place in range(1, len(row["labels"])) if row["labels"][place] != -100]
        expected[index] = hidden[places].mean(0).numpy()
    if size < 32:
        matrix = np.random.default_rng(0).standard_normal((32, size), dtype=np.float32) / np.sqrt(size)
        expected = expected @ matrix
    scoring._projection.cache_clear()
    assert scored.states.dtype == np.float16
    np.testing.assert_allclose(scored.states, expected, rtol=2e-3, atol=2e-3)
    assert not scored.states[-1].any()
