"""Law 1 as a matrix: wherever two untracked runs agree bit for bit, a tracked one agrees too, in weights, optimizer state,
random generators and logs. (Two processes: `test_distributed.py`; other features of Trainer: `test_trainer_features.py`.)"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import random_rows, tiny_llama, tiny_lora
from test_trainer_features import without_timings
from transformers import Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.utils.model_state import preserve_state


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
    """Nested state, flat: tensors as their bytes."""
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
def test_a_tracked_run_is_the_untracked_one(name, noisy, safety, make_args, collator):
    settings, overrides = MATRIX[name]
    runs = []
    for run in ("untracked", "untracked again", "tracked"):
        set_seed(7)
        model, outcomes = model_of(settings), []
        tracker = ForgetTracker(record_steps=2)
        for session, rows in (("s1", noisy), ("s1plus", safety)):
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


def test_a_tracked_packed_run_of_sfttrainer_is_the_untracked_one(tmp_path, tokenizer):
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


def test_weights_that_are_kept_in_buffers_are_not_copied(monkeypatch):
    """As GPTQ keeps them: a copy would be a second model."""
    model, cloned, clone = tiny_llama(), [], torch.Tensor.clone
    model.model.register_buffer("qweight", torch.zeros(2**20 + 1))
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda self, **kwargs: cloned.append(self.numel()) or clone(self, **kwargs)
    )
    with preserve_state(model):
        pass
    assert cloned and max(cloned) < 2**20  # RoPE's are


def test_what_a_forward_pass_counts_in_a_buffer_is_put_back():
    class Counting(torch.nn.Linear):
        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    model = tiny_llama()
    model.lm_head = Counting(32, 128, bias=False)
    model.lm_head.register_buffer("seen", torch.zeros(1))
    with preserve_state(model), torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]))
    assert model.lm_head.seen.item() == 0
