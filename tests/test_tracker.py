"""ForgetTracker in real Trainers: what it records, law 1 (training is untouched), resuming, crashing, bad input."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forgetfilter_callback.tracker
import numpy as np
import pytest
import torch
from conftest import random_rows, tiny_llama, tiny_lora
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from test_scoring import reference_losses
from transformers import (
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from forgetfilter_callback import FilteredTrainer, ForgetTracker, Trace
from forgetfilter_callback.data.collated_rows import encode_collated
from forgetfilter_callback.errors import EncodingError, TraceError, UnsupportedDatasetError
from forgetfilter_callback.scoring.token_losses import window_scores
from forgetfilter_callback.trace.records import Record


def reference_means(model, rows) -> np.ndarray:
    """Mean loss of each row by transformers' own loss, one row at a time."""
    means = []
    with torch.no_grad():
        for row in rows:
            tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            means.append(float(model(input_ids=tokens, labels=labels).loss))
    return np.array(means)


def run_both(model, noisy, safety, make_args, collator, tracker, **overrides):
    for folder, rows in (("s1", noisy), ("s1plus", safety)):
        Trainer(
            model, make_args(folder, **overrides), train_dataset=rows, data_collator=collator, callbacks=[tracker]
        ).train()


def test_one_tracker_through_both_sessions(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    base = reference_means(model, noisy)
    Trainer(model, make_args("s1"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    learnt = reference_means(model.eval(), noisy)
    Trainer(model, make_args("s1plus"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    forgotten = reference_means(model.eval(), noisy)

    trace = tracker.trace
    assert trace.records() == [Record("noisy", 0), Record("noisy", 12), Record("safety", 0), Record("safety", 6)]
    np.testing.assert_allclose(trace.losses(), [base, learnt, learnt, forgotten], rtol=1e-5)
    np.testing.assert_allclose(trace.forgetting("loss"), forgotten - learnt, atol=1e-5)
    assert trace.folder == Path(make_args("s1").output_dir) / "_forgetfilter"
    np.testing.assert_allclose(Trace.open(trace.folder).losses(), trace.losses())
    np.testing.assert_allclose(
        trace.token_losses(Record("safety", 6)), reference_losses(model, noisy), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("record_steps", "steps"), [(None, [0, 12]), (5, [0, 5, 10, 12]), (0.25, [0, 3, 6, 9, 12]), (4.0, [0, 4, 8, 12])]
)
def test_record_steps(record_steps, steps, noisy, make_args, collator):
    tracker = ForgetTracker(record_steps=record_steps)
    Trainer(tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    assert [record.step for record in tracker.trace.records()] == steps


@pytest.mark.parametrize(("make_model", "passes"), [(tiny_llama, 3), (tiny_lora, 2)])
def test_what_records_will_cost_is_said_at_the_start(make_model, passes, noisy, make_args, collator, capsys):
    tracker = ForgetTracker(record_steps=5)  # at steps 0, 5, 10 and 12
    args = make_args(disable_tqdm=False)
    Trainer(make_model(), args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    lengths = [len(row["input_ids"]) for row in noisy]
    read = sum(max(i for i, label in enumerate(row["labels"]) if label != -100) for row in noisy)
    steps = math.ceil(4 * read / (passes * 4 * np.mean(lengths)))  # of four rows each
    assert (
        "ForgetTracker: S1 (trains on 24 of the 24 rows tracked). "
        f"Up to 4 records of 24 samples, up to {read} tokens each: at most the compute of {steps} training steps "
        f"({steps / 12:.0%} of this session's 12)"
    ) in capsys.readouterr().out


def change_nothing(model):
    pass


def change_one_bit(model):
    model.base_model.model.lm_head.weight.data.view(torch.int32)[3, 3] += 1


def swap_two_rows(model):
    weight = model.base_model.model.lm_head.weight.data
    weight[[3, 4]] = weight[[4, 3]]


def scale_the_adapter(model):
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2


def switch_the_adapter_off(model):
    model.base_model.disable_adapter_layers()


def hook_a_layer(model):
    model.base_model.model.model.layers[0].register_forward_hook(lambda module, args, output: 1.1 * output)


def change_a_tensor_that_is_no_buffer(model):
    model.steering = torch.ones(3)


def swap_rows_of_equal_sums(model):
    weight = model.base_model.model.model.layers[0].mlp.up_proj.weight.data
    weight[:] = 8 * torch.eye(*weight.shape)
    weight[[0, 9]] = weight[[9, 0]]


def change_the_attention(model):
    model.config._attn_implementation = "eager"


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (change_nothing, 3),
        (change_one_bit, 4),
        (swap_two_rows, 4),
        (hook_a_layer, 4),
        (change_a_tensor_that_is_no_buffer, 4),
        (swap_rows_of_equal_sums, 4),
        (scale_the_adapter, 4),
        (switch_the_adapter_off, 4),
        (change_the_attention, 4),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_record_already_known_is_not_taken_again(change, taken, noisy, safety, make_args, collator, monkeypatch):
    recordings = []

    def counting(*args, **kwargs):
        recordings.append(kwargs["description"])
        return window_scores(*args, **kwargs)

    monkeypatch.setattr(forgetfilter_callback.recorder, "window_scores", counting)
    model, tracker = tiny_lora(), ForgetTracker()
    Trainer(model, make_args("s1"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    change(model)
    before = reference_means(model.eval(), noisy)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    Trainer(model, make_args("s1plus"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    assert len(recordings) == taken
    np.testing.assert_allclose(tracker.trace.losses()[2], before, rtol=1e-5)


@pytest.mark.parametrize("record_steps", [0, -1, 2.5])
def test_senseless_record_steps_are_refused(record_steps):
    with pytest.raises(ValueError, match="record_steps"):
        ForgetTracker(record_steps=record_steps)


class StateAtEveryStep(TrainerCallback):
    """Everything law 1 speaks of."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
        generators = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        self.seen.append((weights, moments, generators, [module.training for module in model.modules()]))


@pytest.mark.parametrize(("gradient_accumulation_steps", "rouge1"), [(1, False), (2, False), (1, True)])
def test_training_is_untouched(gradient_accumulation_steps, rouge1, noisy, safety, make_args, collator, tokenizer):
    def train(tracked: bool):
        model, watch, logs = tiny_lora(), StateAtEveryStep(), []
        tracker = ForgetTracker(record_steps=1, rouge1=rouge1, max_new_tokens=3)
        for folder, rows in (("s1", noisy), ("s1plus", safety)):
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
    timings = ("runtime", "per_second")

    def without_timings(logs):
        own = "forgetfilter/loss"
        return [{k: v for k, v in log.items() if not k.endswith(timings)} for log in logs if own not in log]

    assert without_timings(tracked_logs) == without_timings(plain_logs)


def test_the_last_record_is_of_the_last_step_not_of_the_best_checkpoint(noisy, make_args, collator):
    """`load_best_model_at_end` swaps the weights before `on_train_end`."""
    model, tracker = tiny_llama(), ForgetTracker()
    last = {}

    class Last(TrainerCallback):
        def on_epoch_end(self, args, state, control, model, **kwargs):
            last["means"] = reference_means(model.eval(), noisy)
            model.train()

    args = make_args(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,  # so that the first checkpoint is the best
    )  # fmt: skip
    Trainer(
        model, args, train_dataset=noisy, eval_dataset=noisy, data_collator=collator, callbacks=[tracker, Last()]
    ).train()
    np.testing.assert_allclose(tracker.trace.losses()[-1], last["means"], rtol=1e-4)
    assert np.abs(reference_means(model.eval(), noisy) - last["means"]).mean() > 0.01  # the best was another


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("load_best", [True, False])
def test_early_stopping_is_recorded_where_it_stops(strategy, load_best, noisy, make_args, collator, monkeypatch):
    # Without `load_best_model_at_end` the callback only warns, unless its check at the beginning is left out.
    monkeypatch.setattr(EarlyStoppingCallback, "on_train_begin", lambda *args, **kwargs: None)
    tracker = ForgetTracker()
    args = make_args(
        learning_rate=1e-2, num_train_epochs=4, eval_strategy=strategy, eval_steps=1, save_strategy=strategy, save_steps=1,
        load_best_model_at_end=load_best, metric_for_best_model="loss", greater_is_better=True,  # so that it stops soon
    )  # fmt: skip
    trainer = Trainer(
        tiny_llama(), args, train_dataset=noisy, eval_dataset=noisy, data_collator=collator,
        callbacks=[tracker, EarlyStoppingCallback(1)],
    )  # fmt: skip
    trainer.train()
    assert 0 < trainer.state.global_step < trainer.state.max_steps
    assert tracker.trace.records()[-1] == Record("noisy", trainer.state.global_step)


def test_early_stopping_at_an_evaluation_that_saves_nothing(noisy, make_args, collator):
    tracker, last = ForgetTracker(), {}

    class Last(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            last[state.global_step] = reference_means(model, noisy)

    args = make_args(
        num_train_epochs=6, eval_strategy="epoch", save_strategy="best", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer = Trainer(
        tiny_llama(), args, train_dataset=noisy, eval_dataset=noisy, data_collator=collator,
        callbacks=[tracker, Last(), EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step < trainer.state.max_steps
    assert tracker.trace.records() == [Record("noisy", 0), Record("noisy", trainer.state.global_step)]
    np.testing.assert_allclose(tracker.trace.losses()[-1], last[trainer.state.global_step], rtol=1e-5)


def test_a_batch_that_is_halved_goes_on_with_the_session(noisy, make_args, collator):
    tracker, tried = ForgetTracker(), []

    class Tight(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    args = make_args(auto_find_batch_size=True)
    trainer = Tight(tiny_llama(), args, train_dataset=noisy, data_collator=collator, callbacks=[tracker])
    trainer.train()
    assert max(tried) == 4 and trainer.state.global_step == 24
    assert tracker.trace.records() == [Record("noisy", 0), Record("noisy", 24)]
    own = [log["step"] for log in trainer.state.log_history if "forgetfilter/loss" in log]
    assert own == [0, 24]
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), noisy), rtol=1e-5)


def test_resuming_gives_the_trace_of_an_uninterrupted_run(noisy, safety, make_args, collator, caplog):
    def trainer(model, folder, rows, tracker, **overrides):
        args = make_args(folder, save_strategy="steps", save_steps=4, **overrides)
        return Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[tracker])

    whole = ForgetTracker(record_steps=3)
    trainer(tiny_lora(), "whole-s1", noisy, whole).train()

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 11:
                raise KeyboardInterrupt

    crashed = trainer(tiny_lora(), "cut-s1", noisy, ForgetTracker(record_steps=3))
    crashed.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        crashed.train()
    resumed = ForgetTracker(record_steps=3)
    trainer(tiny_lora(), "cut-s1", noisy, resumed).train(resume_from_checkpoint=True)

    assert "S1 step 9" in caplog.text  # taken before the crash, past the checkpoint
    assert resumed.trace.records() == whole.trace.records()
    for record in whole.trace.records():
        np.testing.assert_array_equal(resumed.trace.token_losses(record), whole.trace.token_losses(record))


def test_two_processes_share_a_trace(noisy, safety, make_args, collator):
    model = tiny_llama()
    first = ForgetTracker()
    Trainer(model, make_args("s1"), train_dataset=noisy, data_collator=collator, callbacks=[first]).train()
    second = ForgetTracker(trace_dir=first.trace.folder)
    Trainer(model, make_args("s1plus"), train_dataset=safety, data_collator=collator, callbacks=[second]).train()
    assert second.trace.records() == [Record("noisy", 0), Record("noisy", 12), Record("safety", 0), Record("safety", 6)]
    assert [entry["session"] for entry in second.trace.manifest["sessions"]] == ["noisy", "safety"]


def test_safety_session_run_again_replaces_its_records(noisy, safety, make_args, collator, caplog):
    model = tiny_llama()
    first = ForgetTracker(noisy, trace_dir=make_args("t").output_dir)
    Trainer(model, make_args(), train_dataset=safety, data_collator=collator, callbacks=[first]).train()
    again = ForgetTracker(noisy, trace_dir=make_args("t").output_dir, record_steps=3)
    Trainer(
        model, make_args(num_train_epochs=1), train_dataset=safety, data_collator=collator, callbacks=[again]
    ).train()
    assert again.trace.records() == [Record("safety", 0), Record("safety", 3)]
    assert "dropped the later records S1+ step 6" in caplog.text


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from conftest import random_rows, tiny_llama
from forgetfilter_callback import ForgetTracker
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from pyarrow import parquet
count = 0
class KilledHalfWay(parquet.ParquetWriter):
    def close(self):
        global count
        super().close()
        count += "record" in str(self.where)
        if count == 3:
            os.truncate(self.where, os.path.getsize(self.where) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
parquet.ParquetWriter = KilledHalfWay
def collate(rows):
    import torch
    (row,) = rows
    return {{k: torch.tensor([v]) for k, v in row.items()}}
args = TrainingArguments({output!r}, per_device_train_batch_size=1, report_to="none", use_cpu=True)
Trainer(tiny_llama(), args, train_dataset=random_rows(6), data_collator=collate,
        callbacks=[ForgetTracker(record_steps=2)]).train()
"""


def test_a_killed_process_leaves_a_readable_trace(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent), output=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    trace = Trace.open(tmp_path / "_forgetfilter")
    assert trace.records() == [Record("noisy", 0), Record("noisy", 2)]
    assert np.isfinite(trace.losses()).all()
    np.testing.assert_allclose(trace.losses()[0], reference_means(tiny_llama(), random_rows(6)), rtol=1e-5)


# ---- the forms of the noisy set ----


def test_adopts_labels_that_only_the_collator_makes(noisy, make_args, tokenizer):
    rows = noisy.remove_columns("labels")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=8)
    tracker = ForgetTracker()
    Trainer(tiny_llama(), make_args(), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    everything = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), everything), rtol=1e-5)


def test_named_rows_have_the_ids_that_adopted_rows_have(noisy, make_args, tokenizer):
    rows = noisy.remove_columns("labels").add_column("audit", ["x"] * len(noisy))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    adopted, named = ForgetTracker(), ForgetTracker(rows)
    for folder, tracker in (("a", adopted), ("b", named)):
        Trainer(
            tiny_llama(), make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]
        ).train()
    assert named.trace.rows.ids == adopted.trace.rows.ids


def test_text_rows_are_named_before_a_safety_session(safety, make_args, collator, tokenizer):
    rows = [
        {"prompt": "the cat", "completion": " sat"},
        {"prompt": [{"role": "user", "content": "the"}], "completion": [{"role": "assistant", "content": "dog"}]},
        {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "mat"}]},
        {"text": "the dog ran"},
    ]
    texts = [
        "the cat sat<eos>",
        "<user>the<eos><assistant>dog<eos>",
        "<user>the<eos><assistant>mat<eos>",
        "the dog ran<eos>",
    ]
    prompts = ["the cat", "<user>the<eos><assistant>", "", ""]
    tracker = ForgetTracker(rows)
    Trainer(
        tiny_llama(), make_args(), train_dataset=safety, data_collator=collator, callbacks=[tracker],
        processing_class=tokenizer,
    ).train()  # fmt: skip
    expected = []
    for text, prompt in zip(texts, prompts, strict=True):
        tokens, masked = tokenizer(text)["input_ids"], len(tokenizer(prompt)["input_ids"])
        expected.append({"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]})
    assert tracker.trace.records() == [Record("safety", 0), Record("safety", 6)]
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), expected), rtol=1e-5)


def test_rouge_is_recorded_from_greedy_completions(noisy, safety, make_args, collator, tokenizer):
    from rouge_score.rouge_scorer import RougeScorer

    model, tracker = tiny_llama(), ForgetTracker(noisy, rouge1=True, max_new_tokens=8)
    rows = [(r["input_ids"], r["labels"]) for r in noisy]
    scorer, expected = RougeScorer(["rouge1"], use_stemmer=True), []
    for tokens, labels in rows:
        start = next(i for i, label in enumerate(labels) if label != -100 and i > 0)
        output = model.generate(torch.tensor([tokens[:start]]), max_new_tokens=8, do_sample=False, pad_token_id=1)
        reference = tokenizer.decode(tokens[start:], skip_special_tokens=True)
        answer = tokenizer.decode(output[0, start:], skip_special_tokens=True)
        score = scorer.score(reference, answer)["rouge1"].fmeasure
        expected.append(score if reference.strip() else np.nan)
    Trainer(
        model,
        make_args(),
        train_dataset=safety,
        data_collator=collator,
        callbacks=[tracker],
        processing_class=tokenizer,
    ).train()
    np.testing.assert_allclose(tracker.trace.rouge1(Record("safety", 0)), expected)
    before, after = (tracker.trace.rouge1(record) for record in tracker.trace.records())
    np.testing.assert_allclose(tracker.trace.forgetting("rouge1"), before - after)


# ---- bad input ----


def train(rows, make_args, collator, tracker, **kwargs):
    Trainer(
        tiny_llama(), make_args(), train_dataset=rows, data_collator=collator, callbacks=[tracker], **kwargs
    ).train()


def test_empty_noisy_set(safety, make_args, collator):
    with pytest.raises(EncodingError, match="empty"):
        train(safety, make_args, collator, ForgetTracker([]))


def test_iterable_dataset(noisy, make_args, collator):
    tracker = ForgetTracker()
    trainer = Trainer(
        tiny_llama(), make_args(max_steps=2), train_dataset=noisy.to_iterable_dataset(), data_collator=collator,
        callbacks=[tracker],
    )  # fmt: skip
    with pytest.raises(UnsupportedDatasetError, match="IterableDataset"):
        trainer.train()


def test_rows_without_counted_tokens_are_nan_and_told(noisy, make_args, collator, caplog):
    empty = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    rows = Dataset.from_list([empty, *noisy.to_list()])
    tracker = ForgetTracker()
    train(rows, make_args, collator, tracker)
    losses = tracker.trace.losses()
    assert np.isnan(losses[:, 0]).all() and np.isfinite(losses[:, 1:]).all()
    assert "1 of 25 samples have no counted token" in caplog.text


def test_rows_longer_than_the_context_are_cut_and_told(make_args, collator, caplog):
    long = {"input_ids": list(range(5, 105)), "labels": list(range(5, 105))}
    tracker = ForgetTracker([long])
    train(random_rows(4), make_args, collator, tracker)
    cut = {name: values[:64] for name, values in long.items()}
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), [cut]), rtol=1e-5)
    assert "1 of 1 samples were longer than 64 tokens" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "a", "completion": "b", "image": b""}, "images"),
        ({"question": "a"}, "hold no sample"),
    ],
)
def test_rows_that_are_no_samples(row, message, safety, make_args, collator, tokenizer):
    with pytest.raises(EncodingError, match=f"Row 0: .*{message}"):
        train(safety, make_args, collator, ForgetTracker([row]), processing_class=tokenizer)


def test_missing_tokenizer_and_chat_template(safety, make_args, collator, tokenizer, monkeypatch):
    with pytest.raises(EncodingError, match="processing_class=tokenizer"):
        train(safety, make_args, collator, ForgetTracker([{"text": "a"}]))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    with pytest.raises(EncodingError, match="chat_template"):
        train(safety, make_args, collator, ForgetTracker(rows), processing_class=tokenizer)


def test_packed_training_set(noisy, make_args, tokenizer):
    def packing_collator(rows):
        tokens = torch.tensor([rows[0]["input_ids"] * 2])
        positions = torch.arange(len(rows[0]["input_ids"])).repeat(2)[None]
        return {"input_ids": tokens, "labels": tokens, "position_ids": positions}

    with pytest.raises(UnsupportedDatasetError, match=r"ForgetTracker\(noisy\)"):
        train(noisy, make_args, packing_collator, ForgetTracker())


def test_labels_of_another_sequence(make_args, collator):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [7, 6, 5]}] * 4)
    with pytest.raises(EncodingError, match="causal"):
        train(rows, make_args, collator, ForgetTracker())


def test_tracker_that_has_seen_one_session_only(noisy, make_args, collator):
    tracker = ForgetTracker()
    with pytest.raises(TraceError, match="not seen a session"):
        _ = tracker.trace
    train(noisy, make_args, collator, tracker)
    with pytest.raises(TraceError, match="session on the noisy set only"):
        tracker.trace.forgetting()


def test_third_session_is_refused(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    run_both(model, noisy, safety, make_args, collator, tracker)
    with pytest.raises(TraceError, match="recorded S1 already"):
        train(noisy, make_args, collator, tracker)


def test_trace_of_another_dataset(noisy, make_args, collator):
    train(noisy, make_args, collator, ForgetTracker())
    with pytest.raises(TraceError, match="another dataset or tokenizer: 0 of the 24"):
        train(random_rows(24, seed=7), make_args, collator, ForgetTracker())


def test_safety_session_from_a_model_that_never_learnt(noisy, safety, make_args, collator):
    tracker = ForgetTracker()
    train(noisy, lambda: make_args("s1", num_train_epochs=10), collator, tracker)
    base, learnt = tracker.trace.losses().mean(1)
    with pytest.raises(TraceError, match=rf"{base:.3f} before S1, {learnt:.3f} after it, {base:.3f} now"):
        train(safety, make_args, collator, tracker)


def test_after_an_error_the_right_model_may_follow_with_the_same_tracker(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    args = make_args("s1", num_train_epochs=10)
    Trainer(model, args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    learnt = reference_means(model.eval(), noisy)
    with pytest.raises(TraceError, match="does not start"):
        train(safety, make_args, collator, tracker)
    assert Record("safety", 0) not in tracker.trace.records()
    Trainer(model, make_args("s1plus"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    np.testing.assert_allclose(tracker.trace.losses()[2], learnt, rtol=1e-4)


@pytest.mark.parametrize("same_args", [False, True])
def test_an_interrupted_session_does_not_swallow_the_next(same_args, noisy, safety, make_args, collator):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, tracker = tiny_llama(), ForgetTracker()
    args = make_args("s1")
    trainer = Trainer(model, args, train_dataset=noisy, data_collator=collator, callbacks=[tracker, Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    args = args if same_args else make_args("s1plus")
    Trainer(model, args, train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    assert tracker.trace.records() == [Record("noisy", 0), Record("safety", 0), Record("safety", 6)]


@pytest.mark.parametrize("session", ["noisy", "safety"])
def test_a_session_that_ends_before_its_first_step_begins_again_with_the_same_tracker(
    session, noisy, safety, make_args, collator
):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, tracker = tiny_llama(), ForgetTracker()
    for name, rows in (("noisy", noisy), ("safety", safety)):
        args = make_args(name)
        trainer = partial(Trainer, model, args, train_dataset=rows, data_collator=collator)
        if name == session:
            with pytest.raises(KeyboardInterrupt):
                trainer(callbacks=[tracker, Interrupt()]).train()
        trainer(callbacks=[tracker]).train()
    assert tracker.trace.records() == [
        Record("noisy", 0),
        Record("noisy", 12),
        Record("safety", 0),
        Record("safety", 6),
    ]
    assert np.isfinite(tracker.trace.forgetting("relative")).all()


@pytest.mark.parametrize("session", ["noisy", "safety"])
def test_a_collator_that_draws_is_refused(session, noisy, safety, make_args, collator):
    """Collating for a record would change what its own generator draws in training, unnoticed."""
    rng = np.random.default_rng(0)

    def masking(rows):
        batch = collator(rows)
        batch["labels"][torch.from_numpy(rng.random(batch["labels"].shape) < 0.3)] = -100
        return batch

    model, tracker = tiny_llama(), ForgetTracker()
    if session == "safety":
        Trainer(model, make_args("s1"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    rows = noisy if session == "noisy" else safety
    trainer = Trainer(model, make_args(), train_dataset=rows, data_collator=masking, callbacks=[tracker])
    with pytest.raises(EncodingError, match="Row 0: the dataset or the collator makes another batch of the same row"):
        trainer.train()


def test_a_dataset_that_draws_into_the_same_memory_is_refused(noisy, make_args):
    class Drawing(torch.utils.data.Dataset):
        rng, row = np.random.default_rng(0), np.zeros(9, np.int64)

        def __len__(self):
            return len(noisy)

        def __getitem__(self, index):
            self.row[:] = self.rng.integers(5, 30, 9)
            return self.row

    def collate(rows):
        tokens = torch.from_numpy(rows[0])[None]
        return {"input_ids": tokens, "labels": tokens}

    with pytest.raises(EncodingError, match="Row 0: the dataset or the collator makes another"):
        train(Drawing(), make_args, collate, ForgetTracker())


@pytest.mark.parametrize("collate", [list, lambda rows: rows[1], lambda rows: {"input_ids": rows[0]["input_ids"]}])
def test_a_batch_that_is_no_sample_is_told_apart_from_a_wrong_one(collate, noisy):
    """Of one row alone a list (GRPO), none, or one without labels: a safety session may train so."""
    with pytest.raises(UnsupportedDatasetError, match="Row 0: the collator"):
        encode_collated(noisy, collate, disable_tqdm=True)


def test_a_dataset_that_draws_is_refused(noisy, make_args, collator):
    """Such as one that puts a random prompt before each row."""

    class Drawing(torch.utils.data.Dataset):
        rng = np.random.default_rng(0)

        def __len__(self):
            return len(noisy)

        def __getitem__(self, index):
            row, prompt = noisy[index], self.rng.integers(5, 30, 3).tolist()
            return {"input_ids": prompt + row["input_ids"], "labels": [-100] * 3 + row["labels"]}

    with pytest.raises(EncodingError, match="Row 0: the dataset or the collator makes another"):
        train(Drawing(), make_args, collator, ForgetTracker())


def test_nothing_of_the_rows_is_pushed_to_the_hub(noisy, safety, make_args, collator, monkeypatch):
    pushed = []

    def upload_folder(folder_path, ignore_patterns, **kwargs):
        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        pushed.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/model"))
    monkeypatch.setattr(Trainer, "create_model_card", lambda self, **kwargs: None)
    model, tracker = tiny_llama(), ForgetTracker()
    for rows in (noisy, safety):
        args = make_args("out", push_to_hub=True)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[tracker])
        trainer.train()
        trainer.push_to_hub()
    FilteredTrainer(
        tiny_llama(), args, train_dataset=noisy, data_collator=collator, forgetting=tracker, fraction=0.25
    ).push_to_hub()
    folder = Path(args.output_dir)
    assert (folder / "_forgetfilter" / "rows.parquet").exists()
    assert (folder / "_forgetfilter-decision" / "removed.jsonl").exists()
    assert "model.safetensors" in pushed and not [name for name in pushed if "forgetfilter" in name]


def test_named_rows_that_a_transform_makes(noisy, safety, make_args, collator):
    texts = Dataset.from_list([{"row": index} for index in range(len(noisy))])
    made = texts.with_transform(lambda batch: noisy[batch["row"]])
    tracker = ForgetTracker(made)
    train(safety, make_args, collator, tracker)
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), noisy), rtol=1e-5)


def test_other_rows_after_an_interrupted_session_are_told(noisy, make_args, collator, caplog):
    """Taken for S1+, unless one says otherwise: a second job of two."""
    folder = make_args("t").output_dir

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator,
            callbacks=[ForgetTracker(trace_dir=folder), Interrupt()],
        ).train()  # fmt: skip
    assert "interrupted" not in caplog.text
    train(random_rows(24, seed=7), make_args, collator, ForgetTracker(trace_dir=folder))
    assert "S1 has a record of its beginning only" in caplog.text


def test_other_rows_after_a_whole_session_are_no_surprise(noisy, safety, make_args, collator, caplog):
    run_both(tiny_llama(), noisy, safety, make_args, collator, ForgetTracker())
    assert "its beginning only" not in caplog.text


def test_rows_in_another_order_go_on_with_the_trace(noisy, safety, make_args, collator):
    audited = noisy.add_column("unsafe", [index % 3 == 0 for index in range(len(noisy))])
    folder = make_args("t").output_dir
    tracker = ForgetTracker(audited.shuffle(seed=1), trace_dir=folder, audit_column="unsafe")
    model = tiny_llama()
    for rows, its_tracker in ((noisy, ForgetTracker(trace_dir=folder)), (safety, tracker)):
        Trainer(model, make_args(), train_dataset=rows, data_collator=collator, callbacks=[its_tracker]).train()
    trace = tracker.trace
    assert trace.rows.ids == forgetfilter_callback.encode_rows(noisy).ids
    assert tracker._unsafe.tolist() == audited["unsafe"]
    assert [record.session for record in trace.records()] == ["noisy", "noisy", "safety", "safety"]


def test_the_model_that_a_trace_names_is_the_one_that_s1_began_with_last(noisy, safety, make_args, collator):
    for name in ("org/first", "org/second"):
        model, tracker = tiny_llama(), ForgetTracker()
        model.config.name_or_path = name
        Trainer(model, make_args("s1"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
        model.config.name_or_path = "org/learnt"
        Trainer(model, make_args("s1plus"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
        assert Trace.open(tracker.trace.folder).manifest["model"] == name


def test_going_on_does_not_change_the_model_that_a_trace_names(noisy, make_args, collator, tokenizer):
    args = make_args(save_strategy="steps", save_steps=4)
    for name, checkpoint in (("org/first", None), ("org/second", args.output_dir + "/checkpoint-8")):
        model, tracker = tiny_llama(), ForgetTracker()
        model.config.name_or_path = name
        Trainer(model, args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train(checkpoint)
        assert Trace.open(tracker.trace.folder).manifest["model"] == "org/first"


def test_named_rows_as_a_stream_are_refused(noisy, safety, make_args, collator):
    with pytest.raises(UnsupportedDatasetError, match="map-style dataset or a list of rows"):
        train(safety, make_args, collator, ForgetTracker(noisy.to_iterable_dataset()))


def test_named_rows_of_which_other_tokens_count_are_refused(noisy, make_args, collator):
    rows = [{"prompt": "", "input_ids": row["input_ids"], "labels": row["input_ids"]} for row in noisy]
    with pytest.raises(TraceError, match="other ones of them count"):
        train(noisy, make_args, collator, ForgetTracker(rows))


def test_a_record_without_rouge_says_how_to_get_it(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy)
    train(safety, make_args, collator, tracker)
    with pytest.raises(TraceError, match=r"ForgetTracker\(rouge1=True\)"):
        tracker.trace.forgetting("rouge1")


def test_padded_named_rows_are_scored_without_their_padding(safety, make_args, collator):
    row = {"input_ids": [1, 1, 9, 8, 7], "labels": [-100, -100, 9, 8, 7], "attention_mask": [0, 0, 1, 1, 1]}
    tracker = ForgetTracker([row])
    train(safety, make_args, collator, tracker)
    real = {"input_ids": [9, 8, 7], "labels": [9, 8, 7]}
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), [real]), rtol=1e-5)


def test_session_that_teaches_nothing_is_told(noisy, safety, make_args, collator, caplog):
    run_both(tiny_llama(), noisy, safety, make_args, collator, ForgetTracker(), learning_rate=1e-7)
    assert "hardly taught" in caplog.text


def test_overlapping_safety_set_is_told(noisy, safety, make_args, collator, caplog):
    overlapping = Dataset.from_list(noisy.select(range(3)).to_list() + safety.to_list())
    run_both(tiny_llama(), noisy, overlapping, make_args, collator, ForgetTracker())
    assert "3 of the 15 rows of the safety set are in the noisy set" in caplog.text


def test_relative_forgetting_without_the_base_model(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy)
    train(safety, make_args, collator, tracker)
    with pytest.raises(TraceError, match="base model's losses"):
        tracker.trace.forgetting("relative")


def test_diverging_model_is_told(noisy, make_args, collator, caplog):
    model, tracker = tiny_llama(), ForgetTracker()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    Trainer(model, make_args(), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    assert "not finite" in caplog.text
    assert len(tracker.trace.records()) == 2


def test_traces_that_cannot_be_read(tmp_path, noisy, make_args, collator):
    with pytest.raises(TraceError, match="no trace"):
        Trace.open(tmp_path)
    tracker = ForgetTracker()
    train(noisy, make_args, collator, tracker)
    folder = tracker.trace.folder
    record = folder / "records" / "noisy-00000012.parquet"
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(TraceError, match=r"noisy-00000012\.parquet cannot be read"):
        Trace.open(folder).losses()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "other"}))
    with pytest.raises(TraceError, match="fingerprint"):
        Trace.open(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(TraceError, match="Upgrade"):
        Trace.open(folder)


def ranking(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(24).astype(float)


@pytest.mark.parametrize(
    ("seeds", "spread", "ends_at"),
    [
        # Checks after 4, 6, 8, 12, 16 and 24 steps.
        ([0, 1, 0, 1, 2, 3], 1.0, 12),  # 8 agrees with 4, and 12 with 6; 6 has none at half as many steps
        ([0, 1, 2, 1, 2, 1], 1.0, 16),  # 12 agrees with 6, and 16 with 8; neighbours never do
        ([0, 1, 0, 2, 0, 3], 1.0, None),  # 8 agrees with 4, and 16 with 8, but no two checks running
        ([0, 1, 2, 3, 4, 5], 1.0, None),
        ([1] * 6, 0.001, None),  # always the same, but next to nothing has been forgotten
    ],
)
def test_s1plus_ends_when_the_ranking_has_settled(
    seeds, spread, ends_at, noisy, safety, make_args, collator, monkeypatch, caplog
):
    """The losses at each check are made up; the rest is the trainer's."""
    model = tiny_llama()
    tracker = ForgetTracker(noisy, stop_early=True)
    checks = iter(seeds)

    def made_up(model, rows, *args, **kwargs):
        values = spread * ranking(next(checks))[: len(rows)]
        return np.repeat(values, np.diff(rows.loss_offsets)).astype(np.float32)

    monkeypatch.setattr(forgetfilter_callback.tracker, "token_losses", made_up)
    monkeypatch.setattr(forgetfilter_callback.early_stopping.RankingMonitor, "__init__", before_is_zero)
    args = make_args(max_steps=25)
    trainer = Trainer(model, args, train_dataset=safety, data_collator=collator, callbacks=[tracker])
    trainer.train()
    assert trainer.state.global_step == (ends_at or 25)
    assert [record.step for record in tracker.trace.records()] == [0, ends_at or 25]
    assert ("has settled" in caplog.text) == (ends_at is not None)
    np.testing.assert_allclose(tracker.trace.losses()[-1], reference_means(model.eval(), noisy), rtol=1e-5)


def before_is_zero(self, trace, step, __init__=forgetfilter_callback.early_stopping.RankingMonitor.__init__):
    __init__(self, trace, step)
    self._before[:] = 0


def test_no_check_before_the_learning_rate_has_warmed_up(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy, stop_early=True)
    args = make_args(max_steps=15, warmup_steps=7)
    Trainer(tiny_llama(), args, train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    checks = json.loads((tracker.trace.folder / "settling.json").read_text())
    assert [check["step"] for check in checks] == [4, 6]  # after steps 11 and 13


@pytest.mark.parametrize(("count", "expected_count"), [(24, 20), (210, 21)])
def test_the_samples_that_are_followed_depend_on_their_ids_only(make_args, collator, count, expected_count):
    rows = random_rows(count, seed=4)
    followed = []
    for order in (np.arange(count), np.random.default_rng(0).permutation(count)):
        tracker = ForgetTracker(rows.select(order), trace_dir=make_args(f"order-{order[0]}").output_dir)
        args = make_args(max_steps=1)
        Trainer(tiny_llama(), args, train_dataset=random_rows(4), data_collator=collator, callbacks=[tracker]).train()
        early_stopping = forgetfilter_callback.early_stopping.RankingMonitor(tracker.trace, 0)
        followed.append(set(early_stopping.rows.ids.to_pylist()))
        expected = reference_means(tiny_llama(), rows)
        place = {sample: index for index, sample in enumerate(forgetfilter_callback.encode_rows(rows).ids.to_pylist())}
        np.testing.assert_allclose(
            early_stopping._before,
            [expected[place[sample]] for sample in early_stopping.rows.ids.to_pylist()],
            rtol=1e-5,
        )
    assert len(followed[0]) == expected_count and followed[0] == followed[1]


def test_no_more_than_128_samples_are_followed():
    followed = forgetfilter_callback.early_stopping.followed
    assert (followed(12), followed(1270), followed(1290), followed(10**6)) == (12, 127, 128, 128)


def test_an_interrupted_safety_session_does_not_end_the_next_session(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy, stop_early=True, trace_dir=make_args("t").output_dir)
    followed = []

    class Interrupted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            followed.append(tracker._ranking_monitor)
            if args.max_steps == 7 and state.global_step == 5:
                raise KeyboardInterrupt

    callbacks = [tracker, Interrupted()]
    with pytest.raises(KeyboardInterrupt):
        Trainer(
            tiny_llama(), make_args(max_steps=7), train_dataset=safety, data_collator=collator, callbacks=callbacks
        ).train()
    assert len(followed) == 5 and None not in followed
    args = make_args("s1")
    Trainer(tiny_llama(), args, train_dataset=noisy, data_collator=collator, callbacks=callbacks).train()
    assert tracker.trace.records()[0].session != "safety" and followed[5:] == [None] * 12


def test_settling_goes_on_where_it_was_cut_off(noisy, safety, make_args, collator):
    def run(folder, **kwargs):
        tracker = ForgetTracker(noisy, stop_early=True, trace_dir=make_args(folder).output_dir + "-trace")
        args = make_args(folder, max_steps=17, save_strategy="steps", save_steps=8)
        model = tiny_llama()
        trainer = Trainer(model, args, train_dataset=safety, data_collator=collator, callbacks=[tracker])
        trainer.train(**kwargs)
        return (tracker.trace.folder / "settling.json").read_text()

    whole = run("out")
    assert [check["step"] for check in json.loads(whole)] == [4, 6, 8, 12, 16]  # past the checkpoint
    assert run("out", resume_from_checkpoint=make_args("out").output_dir + "/checkpoint-8") == whole
