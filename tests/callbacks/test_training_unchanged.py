"""Wherever two runs without the tracker agree bit for bit, a run with it agrees too.

Compared are weights, optimizer state, random generators and logs.
Two processes: `tests/integration/test_distributed.py`.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers import random_rows, reference_means, tiny_llama, tiny_lora, without_timings
from sft_helpers import rows_of
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from forgetfilter_callback import ForgetTracker


MATRIX = {
    "plain": ({}, {}),
    "dropout": ({"attention_dropout": 0.2}, {}),
    "no shuffling": ({}, {"train_sampling_strategy": "sequential"}),
    "accumulation": ({}, {"gradient_accumulation_steps": 3}),
    "LoRA": ("lora", {}),
    "bf16": ({}, {"bf16": True}),
    "weights in bf16": ({"dtype": torch.bfloat16}, {}),
    "schedule-free": ({}, {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}),
    "8-bit optimizer": ({}, {"optim": "adamw_8bit"}),
    "SGD with momentum": ({}, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    "clipping and warmup": ({}, {"max_grad_norm": 0.1, "warmup_steps": 3}),
}


def model_of(settings: object) -> torch.nn.Module:
    if settings == "lora":
        return tiny_lora().train()
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.float32)
    return tiny_llama(**settings).to(dtype).train()


def flattened(state: object, name: str = "") -> dict[str, object]:
    """Flatten nested state; tensors become their dtype and bytes."""
    if isinstance(state, dict):
        return {key: value for part in state for key, value in flattened(state[part], f"{name}.{part}").items()}
    if isinstance(state, list | tuple):
        return {key: value for i, each in enumerate(state) for key, value in flattened(each, f"{name}.{i}").items()}
    if isinstance(state, torch.Tensor):
        return {name: (state.dtype, state.detach().reshape(-1).view(torch.uint8).tolist() if state.numel() else [])}
    if isinstance(state, np.ndarray):
        return {name: state.tolist()}
    return {name: state}


def generators() -> dict[str, object]:
    return flattened([torch.get_rng_state(), np.random.get_state(), random.getstate()])


def outcome(trainer: Trainer) -> list[dict[str, object]]:
    optimizer = flattened(trainer.optimizer.state_dict())
    return [
        flattened(trainer.model.state_dict()),
        optimizer,
        generators(),
        {"logs": without_timings(trainer.state.log_history)},
    ]


@pytest.mark.parametrize("name", MATRIX)
def test_a_tracked_run_equals_an_untracked_run(name, noisy, safety, make_args, collator):
    settings, overrides = MATRIX[name]
    runs = []
    for run in ("untracked", "untracked again", "tracked"):
        set_seed(7)
        model, outcomes = model_of(settings), []
        tracker = ForgetTracker(record_steps=2)
        for session, rows in (("noisy", noisy), ("safety", safety)):
            trainer = Trainer(
                model, make_args(f"{run}-{session}", **overrides), train_dataset=rows, data_collator=collator,
                callbacks=[tracker] if run == "tracked" else [],
            )  # fmt: skip
            trainer.train()
            outcomes += outcome(trainer)
        runs.append(outcomes)
    assert runs[0] == runs[1], "this configuration is not deterministic"
    for part, (untracked, tracked) in enumerate(zip(runs[0], runs[2], strict=True)):
        assert untracked == tracked, part
    assert len(tracker.trace.records()) > 4


def test_a_packed_sfttrainer_run_is_unchanged(tmp_path, tokenizer):
    rows = random_rows(24, seed=1).remove_columns("labels")
    runs = []
    for run in ("untracked", "untracked again", "tracked"):
        set_seed(7)
        args = SFTConfig(str(tmp_path / run), max_length=64, packing=True, num_train_epochs=3, learning_rate=1e-2, seed=3,
                         per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
                         disable_tqdm=True, save_strategy="no")  # fmt: skip
        tracker = ForgetTracker(random_rows(9, seed=4))
        trainer = SFTTrainer(
            tiny_llama(attention_dropout=0.1).train(), args, train_dataset=rows, processing_class=tokenizer,
            callbacks=[tracker] if run == "tracked" else [],
        )  # fmt: skip
        trainer.train()
        runs.append(outcome(trainer))
    assert runs[0] == runs[1] == runs[2]
    assert len(tracker.trace.records()) == 2


class StateAtEveryStep(TrainerCallback):
    """Weights, optimizer state, random generators and training modes after every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
        generators = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        self.seen.append((weights, moments, generators, [module.training for module in model.modules()]))


@pytest.mark.parametrize(("gradient_accumulation_steps", "rouge1"), [(1, False), (2, False), (1, True)])
def test_every_step_is_unchanged(gradient_accumulation_steps, rouge1, noisy, safety, make_args, collator, tokenizer):
    def train(tracked: bool):
        model, watch, logs = tiny_lora(), StateAtEveryStep(), []
        tracker = ForgetTracker(record_steps=1, rouge1=rouge1, max_new_tokens=3 if rouge1 else None)
        for folder, rows in (("noisy", noisy), ("safety", safety)):
            args = make_args(
                f"{folder}-{tracked}", gradient_accumulation_steps=gradient_accumulation_steps, eval_strategy="epoch"
            )
            trainer = Trainer(
                model, args, train_dataset=rows, eval_dataset=safety, data_collator=collator,
                callbacks=[tracker, watch] if tracked else [watch], processing_class=tokenizer,
            )  # fmt: skip
            trainer.train()
            logs += trainer.state.log_history
        return watch.seen, logs

    (plain, plain_logs), (tracked, tracked_logs) = train(False), train(True)
    assert len(plain) == len(tracked) > 0
    for (weights, moments, generators, modes), (weights_2, moments_2, generators_2, modes_2) in zip(
        plain, tracked, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_2, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(moments, moments_2, strict=True))
        assert generators == generators_2
        assert modes == modes_2
    assert without_timings(tracked_logs) == without_timings(plain_logs)


_FIELDS = TrainingArguments.__dataclass_fields__
ACTIVATION_CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"  # the older name
)
FEATURES = {
    "save_total_limit": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
    "gradient accumulation": {"gradient_accumulation_steps": 3},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "NEFTune": {"neftune_noise_alpha": 5},
    "dataloader workers": {"dataloader_num_workers": 2},
    "activation checkpointing": {ACTIVATION_CHECKPOINTING: True},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "schedule-free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
    "evaluation between steps": {"eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_training_is_unchanged_with_trainer_features(feature, noisy, safety, make_args, collator):
    runs = []
    for tracked in (False, True):
        model, tracker, logs = tiny_lora().train(), ForgetTracker(record_steps=1), []
        for folder, rows in (("noisy", noisy), ("safety", safety)):
            trainer = Trainer(
                model, make_args(f"{folder}-{tracked}", **FEATURES[feature]), train_dataset=rows, eval_dataset=safety,
                data_collator=collator, callbacks=[tracker] if tracked else [],
            )  # fmt: skip
            trainer.train()
            logs += without_timings(trainer.state.log_history)
        runs.append((model, logs))
    (plain, plain_logs), (model, logs) = runs
    assert logs == plain_logs and len(logs) > 4
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    np.testing.assert_allclose(tracker.trace.losses()[-1], reference_means(model.eval(), noisy), rtol=1e-5)
    last = tracker.trace.records()[-1].step
    assert [record.step for record in tracker.trace.records() if record.session == "safety"] == list(range(last + 1))


def wrapped(model, backend):
    return torch.compile(model, backend=backend, dynamic=True)


def in_place(model, backend):
    model.compile(backend=backend, dynamic=True)
    return model


@pytest.mark.parametrize("compiled", [wrapped, in_place])
def test_a_compiled_model_is_not_compiled_for_records(compiled, noisy, make_args, collator):
    """Torch would compile it again for each hook and each shape, until it gives up and compiles no training step either."""
    runs = []
    for tracked in (False, True):
        torch.compiler.reset()
        graphs, tracker = [], ForgetTracker(record_steps=1, batch_tokens=64)

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        model = tiny_llama()
        args = make_args(f"{tracked}", max_steps=3, remove_unused_columns=False)
        trainer = Trainer(
            compiled(model, backend), args, train_dataset=noisy, data_collator=collator,
            callbacks=[tracker] if tracked else [],
        )  # fmt: skip
        trainer.train()
        runs.append((len(graphs), without_timings(trainer.state.log_history), model))
    torch.compiler.reset()
    assert runs[0][0] == runs[1][0] > 0 and runs[0][1] == runs[1][1]
    expected = [reference_means(tiny_llama(), noisy), reference_means(runs[1][2].eval(), noisy)]
    np.testing.assert_allclose(tracker.trace.losses()[[0, -1]], expected, rtol=1e-5)


def test_packed_sft_training_with_evaluation_is_unchanged(sft_config, chat_tokenizer):
    def train(tracked: bool):
        model = tiny_llama()
        args = sft_config(
            max_steps=6, packing=True, max_length=32, logging_steps=1, eval_strategy="steps", eval_steps=2
        )
        trainer = SFTTrainer(
            model, args, train_dataset=rows_of("text"), eval_dataset=rows_of("messages"), processing_class=chat_tokenizer,
            callbacks=[ForgetTracker(rows_of("tokens"), record_steps=1)] if tracked else [],
        )  # fmt: skip
        trainer.train()
        return without_timings(trainer.state.log_history), [
            parameter.detach().numpy() for parameter in model.parameters()
        ]

    (logs, weights), (tracked_logs, tracked_weights) = train(False), train(True)
    assert logs == tracked_logs
    for one, other in zip(weights, tracked_weights, strict=True):
        np.testing.assert_array_equal(one, other)
