"""Two processes (`accelerate launch`, DDP and FSDP2 on the CPU): the same values as one process, and training unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from helpers import plain_loop, random_rows, reference_means, tiny_llama
from transformers import Trainer

from forgetfilter_callback import ForgetTracker, Trace
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trainers.base_model_check import BaseModelCheck
from forgetfilter_callback.utils.parallelism import why_unsupported


SCRIPT = """
import gc, json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import numpy as np, torch
from helpers import random_rows, tiny_llama
from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker, ReviewQueue, Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.filtering import find_reviewed
from forgetfilter_callback.scoring import forward_pass
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

output, rows = Path(sys.argv[1]), int(sys.argv[2])
gc.freeze()  # each training run collects garbage, and looks at all imported modules otherwise
forward_pass._LOGITS_PER_PASS = 5 * 128  # processes need different numbers of passes through the output head
if "fsdp2" in sys.argv:
    # accelerate has FSDP on accelerators only; torch has it on the CPU too.
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    initialize = AcceleratorState.__init__
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )

    def with_fsdp(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin

    AcceleratorState.__init__ = with_fsdp

def whole(weights):
    return {{name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in weights.items()}}

def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda name, value: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
    return {{"input_ids": pad("input_ids", 1), "labels": pad("labels", -100)}}

def args(folder):
    return TrainingArguments(str(output / folder), num_train_epochs=2, per_device_train_batch_size=2, learning_rate=1e-2,
                             use_cpu="gpu" not in sys.argv, logging_steps=1, save_strategy="no", report_to="none",
                             disable_tqdm=True)

stopping = "stopping" in sys.argv
noisy, safety = random_rows(rows, seed=1), random_rows(36 if stopping else 12, seed=2)


def train_both(name, callbacks):
    model, logs = tiny_llama(), []
    for session, dataset in (("noisy", noisy), ("safety", safety)):
        trainer = Trainer(model, args(name + session), train_dataset=dataset, data_collator=collate,
                          callbacks=callbacks)
        trainer.train()
        logs += [
            {{k: v for k, v in log.items() if not k.endswith(("runtime", "per_second"))}}
            for log in trainer.state.log_history if not any(name.startswith("forgetfilter/") for name in log)
        ]
        save(trainer, name + session)
    return logs, torch.get_rng_state().sum().item(), int(np.random.get_state()[2])


def save(trainer, name):
    state = whole(trainer.model.state_dict())
    if is_main:
        torch.save(state, output / f"{{name}}.pt")


is_main = args("").process_index == 0
tracker, report = ForgetTracker(record_steps=2, stop_early=stopping), {{}}
if "plain" in sys.argv:
    report["plain"] = train_both("plain-", [])
if not is_main:  # only the main process reads records
    Trace.records = Trace.stored_losses = None
report["tracked"] = train_both("", [tracker])
if "limited" in sys.argv:
    Trainer(tiny_llama(), args("limited"), train_dataset=random_rows(50, seed=1), data_collator=collate,
            callbacks=[ForgetTracker(record_base=False)]).train()
if "again" in sys.argv:
    class FailOnce(TrainerCallback):
        failed = False

        def on_step_end(self, args, state, control, **kwargs):
            if not self.failed:
                self.failed = True
                raise RuntimeError

    retried, model = ForgetTracker(), tiny_llama()
    Trainer(model, args("again"), train_dataset=noisy, data_collator=collate, callbacks=[retried]).train()
    trainer = Trainer(model, args("again-safety"), train_dataset=safety, data_collator=collate,
                      callbacks=[retried, FailOnce()])
    try:
        trainer.train()
    except RuntimeError:
        trainer.train()
filtered = FilteredTrainer(tiny_llama(), args("filtered"), train_dataset=noisy, data_collator=collate,
                           forgetting=tracker, filter_config=FilterConfig(fraction=0.3))
filtered.train()
report["removed"] = np.flatnonzero(filtered.filter_result.removed).tolist()
if "weighted" in sys.argv:
    weights = np.linspace(0, 1, rows)
    find_reviewed.unsafe_probabilities = lambda queue: 1 - weights
    if is_main:
        ReviewQueue(tracker.trace).add({{0: "safe"}})
    torch.distributed.barrier()
    descent = args("weighted")
    descent.optim, descent.learning_rate, descent.lr_scheduler_type = "sgd", 0.1, "constant"
    descent.gradient_accumulation_steps, descent.max_grad_norm = 4, 0.0  # 2 processes × 2 rows × 4: all rows in one step
    weighted = FilteredTrainer(tiny_llama(), descent, train_dataset=noisy.select(range(16)), data_collator=collate,
                               forgetting=tracker,
                               filter_config=FilterConfig(reviewed=tracker.trace.folder / "review", weights=True))
    weighted.train()
    save(weighted, "weighted")
if "failing" in sys.argv:
    (output / "file").touch()
    failing = ForgetTracker(trace_dir=output / "file")  # only the main process makes this folder
    try:
        Trainer(tiny_llama(), args("failing"), train_dataset=noisy, data_collator=collate, callbacks=[failing]).train()
    except TraceError as error:
        report["error"] = type(error).__name__
(output / f"rank-{{args('').process_index}}.json").write_text(json.dumps(report))
torch.distributed.barrier()
# torch sometimes aborts a process that has run DDP on the CPU while it takes itself down (without the tracker too).
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def launch(
    folder: Path, *arguments: object, processes: int = 2, config: str | None = None
) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    if config is not None:
        command += ["--config_file", str(Path(__file__).parents[1] / "distributed" / f"{config}.yaml")]
    else:
        command += ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), str(folder), *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def weights(file: Path) -> dict:
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, kind) -> Path:
    """Everything that the tests below look at, from one launch."""
    folder = tmp_path_factory.mktemp("tracked")
    # An odd number of rows: shards of 9 and 8.
    process = launch(folder, 17, kind, "plain", "limited", "again", "weighted", "failing")
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


def reports(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_values_equal_those_of_one_process(tracked):
    trace, noisy = Trace.open(tracked / "noisy" / "_forgetfilter"), random_rows(17, seed=1)
    model = tiny_llama()
    expected = {Record("noisy", 0): reference_means(model, noisy)}
    for folder, last, next_first in (
        ("noisy", Record("noisy", 10), Record("safety", 0)),
        ("safety", Record("safety", 6), None),
    ):
        model.load_state_dict(weights(tracked / f"{folder}.pt"))
        expected[last] = expected[next_first] = reference_means(model, noisy)
    records = trace.records()
    assert len(records) == 10
    for record in expected.keys() & set(records):
        np.testing.assert_allclose(trace.losses()[records.index(record)], expected[record], rtol=1e-5)


def test_32_rows_of_the_base_model_equal_those_of_one_process(tracked):
    trace = Trace.open(tracked / "limited" / "_forgetfilter")
    losses, expected = trace.losses()[0], reference_means(tiny_llama(), random_rows(50, seed=1))
    assert np.isfinite(losses).sum() == 32
    np.testing.assert_allclose(losses, np.where(np.isfinite(losses), expected, np.nan), rtol=1e-5)


def test_a_failed_session_can_be_trained_again(tracked):
    trace = Trace.open(tracked / "again" / "_forgetfilter")
    assert trace.records() == [Record("noisy", 0), Record("noisy", 10), Record("safety", 0), Record("safety", 6)]
    assert (trace.folder / "superseded" / "1" / "safety-00000000.parquet").exists()


def test_all_processes_remove_the_same_samples(tracked):
    removed = [report["removed"] for report in reports(tracked)]
    values = Trace.open(tracked / "noisy" / "_forgetfilter").forgetting()
    assert removed[0] == removed[1] == np.sort(np.argsort(values)[-5:]).tolist()


def test_training_is_unchanged_on_every_process(tracked):
    for report in reports(tracked):
        logs, *generators = report["plain"]
        assert report["tracked"] == [logs, *generators] and len(logs) > 16
    for session in ("noisy", "safety"):
        plain_weights, tracked_weights = (weights(tracked / f"{name}{session}.pt") for name in ("plain-", ""))
        for name, value in plain_weights.items():
            np.testing.assert_array_equal(value.numpy(), tracked_weights[name].numpy())


def test_weights_equal_a_plain_loop(tracked):
    trained, rows = weights(tracked / "weighted.pt"), random_rows(17, seed=1).select(range(16))
    expected = plain_loop(tiny_llama(), rows, np.linspace(0, 1, 17)[:16], 2)
    for name, start in tiny_llama().named_parameters():
        moved = float((expected[name] - start.detach()).abs().max())
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-5, atol=max(5e-3 * moved, 1e-7))


@pytest.mark.slow
def test_more_processes_than_rows(tmp_path, kind):
    process = launch(tmp_path / "three", 2, kind, "stopping", processes=3)
    assert process.returncode == 0, process.stderr[-4000:]
    trace = Trace.open(tmp_path / "three" / "noisy" / "_forgetfilter")
    np.testing.assert_allclose(trace.losses()[0], reference_means(tiny_llama(), random_rows(2, seed=1)), rtol=1e-5)
    checks = json.loads((trace.folder / "early_stopping.json").read_text())
    assert [check["step"] for check in checks] == [4, 6, 8]


def test_a_failure_of_the_main_process_is_raised_on_all_processes(tracked):
    """A file is where the folder of the trace should be."""
    (error,) = {report["error"] for report in reports(tracked)}
    assert error == "TraceError"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("config", ["fsdp2", "zero2", "zero3"])
def test_sharded_weights_on_gpus(config, tmp_path):
    process = launch(tmp_path / "gpus", "tracked", 17, "gpu", config=config)
    assert process.returncode == 0, process.stderr[-4000:]
    model, noisy = tiny_llama(), random_rows(17, seed=1)
    losses = Trace.open(tmp_path / "gpus" / "noisy" / "_forgetfilter").losses()
    np.testing.assert_allclose(losses[0], reference_means(model, noisy), rtol=1e-4)
    if config != "zero3":  # `state_dict` is empty there
        model.load_state_dict(weights(tmp_path / "gpus" / "safety.pt"))
        np.testing.assert_allclose(losses[-1], reference_means(model, noisy), rtol=1e-4)


@pytest.mark.parametrize("sharding", [DistributedType.FSDP, DistributedType.MEGATRON_LM])  # FSDP that wraps nothing
def test_other_sharding_is_refused(sharding, noisy, make_args, collator, monkeypatch):
    trainer = Trainer(
        tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, callbacks=[ForgetTracker()]
    )
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", sharding)
    with pytest.raises(NotImplementedError, match="sharded"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


# Older versions of accelerate have no sequence parallelism.
SPLITS = [{name: 2} for name in ("cp_size", "sp_size") if name in signature(ParallelismConfig).parameters]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_split_sequences_are_refused(split, noisy, make_args, collator, monkeypatch, caplog):
    """Hooks of accelerate drop attention masks under context parallelism, and prefix sharing needs its own mask."""
    tracker = ForgetTracker()
    trainer = Trainer(tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, callbacks=[tracker])
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(**split))
    start = (trainer.args, trainer.state, trainer.control)
    with pytest.raises(NotImplementedError, match="sequences are split over processes by context or sequence parall"):
        trainer.callback_handler.on_train_begin(*start)
    trainer.remove_callback(tracker)
    trainer.add_callback(BaseModelCheck(None))
    trainer.callback_handler.on_train_begin(*start)
    assert "Could not check that this model is the base model: sequences are split" in caplog.text
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig())
    assert why_unsupported(tiny_llama()) is None


@pytest.mark.parametrize("whole", [DistributedType.MULTI_NPU, DistributedType.MULTI_XPU, DistributedType.MULTI_GPU])
def test_unsharded_weights_on_any_accelerator_are_supported(whole, monkeypatch):
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", whole)
    assert why_unsupported(tiny_llama()) is None
