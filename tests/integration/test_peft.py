"""PEFT adapters: losses equal those of one row at a time, and training is unchanged."""

from __future__ import annotations

import math
import weakref
from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers import only_in_one_row, reference_means, tiny_llama
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker
from forgetfilter_callback.callbacks import recorder
from forgetfilter_callback.data import encoded_rows
from forgetfilter_callback.errors import ForgetFilterError
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.scoring.token_losses import window_scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trainers import base_model_check


CONFIGS = {
    "LoRA": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "DoRA": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "LoRA with a saved module": LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "IA3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def adapted(config):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), config)


def train(model, args, rows, collator, *callbacks):
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=list(callbacks))
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_training_with_an_adapter(name, noisy, safety, make_args, collator):
    plain, model = adapted(CONFIGS[name]), adapted(CONFIGS[name])
    base = reference_means(tiny_llama(), noisy)
    first = reference_means(adapted(CONFIGS[name]).eval(), noisy)
    tracker, learned = ForgetTracker(), None
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        train(plain, make_args(f"{folder}-plain", learning_rate=0.1), rows, collator)
        train(model, make_args(folder, learning_rate=0.1), rows, collator, tracker)
        learned = reference_means(model.eval(), noisy) if learned is None else learned
    expected = [first, learned, learned, reference_means(model.eval(), noisy)]
    np.testing.assert_allclose(tracker.trace.losses(), expected, rtol=1e-5)
    assert np.abs(learned - base).mean() > 0.002
    for (key, one), (_, other) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad, key


def test_a_new_random_soft_prompt_passes_the_base_model_check(noisy, safety, make_args, collator, caplog):
    """A new prompt changes the losses from those of the first noisy record."""

    def prompted(seed):
        base = tiny_llama()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(4)  # larger weights, so that the prompt matters
        model = get_peft_model(base, CONFIGS["prompt tuning"])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.normal_()
        return model

    model, tracker = prompted(1), ForgetTracker()
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        train(model, make_args(folder), rows, collator, tracker)
    restart = prompted(2)
    first = tracker.trace.losses()[0]
    assert np.abs(reference_means(restart.eval(), noisy) - first).mean() > base_model_check.MAX_LOSS_DIFFERENCE
    FilteredTrainer(
        restart,
        make_args("refit"),
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    ).train()
    assert "its prompt embeddings are initialized at random each time" in caplog.text


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 1e-5),
        ({"load_in_8bit": True}, 2e-3),
    ],  # 8-bit computes in float16
)
def test_a_quantized_base_model(quantization, precision, noisy, safety, make_args, collator, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # The smallest width that the AVX512 kernels of bitsandbytes accept.
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def load():
        config = BitsAndBytesConfig(**quantization)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
        torch.manual_seed(0)
        return get_peft_model(prepare_model_for_kbit_training(base), CONFIGS["LoRA"])

    def evaluated(model):
        """Evaluate a copy: on CPUs with AVX512-BF16 a 4-bit model stops learning once it has been evaluated."""
        copy = deepcopy(model).eval()
        for module in copy.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.training = True
        return reference_means(copy, noisy)

    plain, model, tracker = load(), load(), ForgetTracker()
    expected = [evaluated(model)]
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        train(plain, make_args(f"{folder}-plain", learning_rate=0.1), rows, collator)
        train(model, make_args(folder, learning_rate=0.1), rows, collator, tracker)
        expected += [evaluated(model)] * (2 if folder == "noisy" else 1)
    np.testing.assert_allclose(tracker.trace.losses(), expected, rtol=precision)
    assert np.abs(expected[1] - expected[0]).mean() > 0.01
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    FilteredTrainer(
        load(), make_args("filtered", max_steps=1), train_dataset=noisy, data_collator=collator, forgetting=tracker,
        filter_config=FilterConfig(fraction=0.2),
    ).train()  # passes the base model check  # fmt: skip


def test_the_base_record_is_taken_with_the_adapter_disabled(noisy, safety, make_args, collator, monkeypatch, caplog):
    """A tracker used in the safety session only still has `relative` forgetting and the base model check."""
    model = adapted(CONFIGS["LoRA"])
    train(model, make_args("noisy", learning_rate=0.1), noisy, collator)
    untracked = adapted(CONFIGS["LoRA"])
    untracked.load_state_dict(model.state_dict())
    tracker = ForgetTracker(noisy)
    train(model, make_args("safety"), safety, collator, tracker)
    train(untracked, make_args("safety-untracked"), safety, collator)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untracked.parameters(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in untracked.parameters()]
    assert tracker.trace.records() == [Record("noisy", 0), Record("safety", 0), Record("safety", 6)]
    base = reference_means(tiny_llama(), noisy)
    np.testing.assert_allclose(tracker.trace.losses()[0], base, rtol=1e-5)
    assert (
        "so this model without its adapter was recorded. If noisy finetuning continued an earlier adapter"
        in caplog.text
    )
    assert np.isfinite(tracker.trace.forgetting("relative")).all()
    monkeypatch.setattr(base_model_check, "MAX_LOSS_DIFFERENCE", 0.01)  # this small model learns only little
    trainer = FilteredTrainer(
        model, make_args("trap"), train_dataset=noisy, data_collator=collator, forgetting=tracker,
        filter_config=FilterConfig(fraction=0.2),
    )  # fmt: skip
    with pytest.raises(ForgetFilterError, match="not the base model of the trace"):
        trainer.train()


def test_records_hold_few_windows_in_memory(noisy, safety, make_args, collator, monkeypatch):
    """Also the base record, which is written only if the adapter turns out to have learned something."""
    in_memory: weakref.WeakSet[Scores] = weakref.WeakSet()
    counts = []

    def watched_scores(*args, **kwargs):
        for scores in window_scores(*args, **kwargs):
            in_memory.add(scores)
            counts.append(len(in_memory))
            yield scores

    model, tracker = adapted(CONFIGS["LoRA"]), ForgetTracker(noisy)
    train(model, make_args("noisy", learning_rate=0.1), noisy, collator)
    monkeypatch.setattr(encoded_rows, "WINDOW", 3)
    monkeypatch.setattr(recorder, "window_scores", watched_scores)
    train(model, make_args("safety", max_steps=1), safety, collator, tracker)
    assert tracker.trace.records() == [Record("noisy", 0), Record("safety", 0), Record("safety", 1)]
    assert len(counts) == 3 * math.ceil(len(noisy) / 3) and max(counts) <= 3
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), noisy), rtol=1e-5)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_new_adapter_on_a_merged_model_gives_no_base_record(overflows, noisy, safety, make_args, collator, caplog):
    """With the new adapter disabled, the model is the one after noisy finetuning."""
    model = adapted(CONFIGS["LoRA"])
    train(model, make_args("noisy", learning_rate=0.1), noisy, collator)
    merged = get_peft_model(model.merge_and_unload(), CONFIGS["LoRA"])
    if overflows:  # one loss is infinite with the adapter disabled
        _, token = only_in_one_row(noisy, safety)
        adapter = merged.base_model.model.model.layers[0].self_attn.q_proj

        def overflow(module, args, logits):
            return logits.index_fill(-1, torch.tensor([token]), -torch.inf) if adapter.disable_adapters else logits

        merged.base_model.model.lm_head.register_forward_hook(overflow)
    tracker = ForgetTracker(noisy)
    train(merged, make_args("safety"), safety, collator, tracker)
    assert tracker.trace.records() == [Record("safety", 0), Record("safety", 6)]
    assert "without its adapter was recorded" not in caplog.text


@pytest.mark.parametrize("settings", [{"init_lora_weights": False}, {"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_no_base_record_when_disabling_the_adapter_does_not_restore_the_base_model(
    settings, noisy, safety, make_args, collator, monkeypatch
):
    monkeypatch.setattr(recorder, "MIN_ADAPTED", -math.inf)  # the size of the change alone would allow a base record
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    tracker, model = ForgetTracker(noisy), adapted(config)
    train(model, make_args("noisy", learning_rate=0.1), noisy, collator)
    train(model, make_args("safety"), safety, collator, tracker)
    assert Record("noisy", 0) not in tracker.trace.records()


def test_an_adapter_stacked_on_the_adapter_of_the_noisy_session(noisy, safety, make_args, collator):
    """The first adapter stays active and frozen. With both disabled, the model is the base model."""

    def stacked():
        model = adapted(CONFIGS["LoRA"])
        train(model, make_args("noisy", learning_rate=0.1), noisy, collator)
        torch.manual_seed(1)
        model.add_adapter("safety", CONFIGS["LoRA"])
        model.base_model.set_adapter(["default", "safety"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("safety" in name)
        return model

    model, untracked, tracker = stacked(), stacked(), ForgetTracker(noisy)
    learned = reference_means(model.eval(), noisy)
    train(model, make_args("safety"), safety, collator, tracker)
    train(untracked, make_args("safety-untracked"), safety, collator)
    base = reference_means(tiny_llama(), noisy)
    np.testing.assert_allclose(tracker.trace.losses()[:2], [base, learned], rtol=1e-5)
    for (key, one), (_, other) in zip(model.named_parameters(), untracked.named_parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad, key


def test_merged_adapters_between_sessions(noisy, safety, make_args, collator):
    model, tracker = adapted(CONFIGS["LoRA"]), ForgetTracker()
    train(model, make_args("noisy", learning_rate=0.1), noisy, collator, tracker)
    merged = get_peft_model(model.merge_and_unload(), CONFIGS["LoRA"])
    learned = reference_means(merged.eval(), noisy)
    train(merged, make_args("safety"), safety, collator, tracker)
    np.testing.assert_allclose(tracker.trace.losses()[2], learned, rtol=1e-5)
    np.testing.assert_allclose(tracker.trace.losses()[1], learned, rtol=1e-4)
