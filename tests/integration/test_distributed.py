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

from forgetfilter_callback import ForgetTracker, Trace, encode_rows
from forgetfilter_callback.scoring.token_losses import token_losses
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trainers.base_model_check import BaseModelCheck
from forgetfilter_callback.utils.model_state import preserve_state, why_unsupported


SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import numpy as np, torch
from helpers import random_rows, tiny_llama
from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker, Trace
from forgetfilter_callback.scoring import forward_pass
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

output, tracked, rows = Path(sys.argv[1]), sys.argv[2] != "untracked", int(sys.argv[3])
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

stopping = sys.argv[2] == "stopping"
model, tracker = tiny_llama(), ForgetTracker(record_steps=2, stop_early=stopping)
noisy, safety = random_rows(rows, seed=1), random_rows(36 if stopping else 12, seed=2)
logs = []
for folder, dataset in (("noisy", noisy), ("safety", safety)):
    trainer = Trainer(model, args(folder), train_dataset=dataset, data_collator=collate,
                      callbacks=[tracker] if tracked else [])
    trainer.train()
    logs += [
        {{k: v for k, v in log.items() if not k.endswith(("runtime", "per_second"))}}
        for log in trainer.state.log_history if "forgetfilter/loss" not in log
    ]
    state = whole(model.state_dict())
    if trainer.args.process_index == 0:
        torch.save(state, output / f"{{folder}}.pt")
generators = (torch.get_rng_state().sum().item(), int(np.random.get_state()[2]))
removed = None
if trainer.args.process_index > 0:  # only the main process reads records
    Trace.records = Trace.token_losses = None
if "weighted" in sys.argv:
    from forgetfilter_callback import ReviewQueue
    from forgetfilter_callback.filtering import find_reviewed

    weights = np.linspace(0, 1, rows)
    find_reviewed.unsafe_probabilities = lambda queue: 1 - weights
    if trainer.args.process_index == 0:
        ReviewQueue(tracker.trace).add({{0: "safe"}})
    torch.distributed.barrier()
    descent = args("weighted")
    descent.optim, descent.learning_rate, descent.lr_scheduler_type = "sgd", 0.1, "constant"
    descent.gradient_accumulation_steps, descent.max_grad_norm = rows // 4, 0.0
    trainer = FilteredTrainer(tiny_llama(), descent, train_dataset=noisy, data_collator=collate, forgetting=tracker,
                              filter_config=FilterConfig(reviewed=tracker.trace.folder / "review", weights=True))
    trainer.train()
    state = whole(trainer.model.state_dict())
    if trainer.args.process_index == 0:
        torch.save(state, output / "weighted.pt")
elif tracked:
    filtered = FilteredTrainer(tiny_llama(), args("filtered"), train_dataset=noisy, data_collator=collate,
                               forgetting=tracker, filter_config=FilterConfig(fraction=0.3))
    filtered.train()
    removed = np.flatnonzero(filtered.filter_result.removed).tolist()
(output / f"rank-{{trainer.args.process_index}}.json").write_text(json.dumps([logs, removed, generators]))
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
    folder = tmp_path_factory.mktemp("tracked")
    process = launch(folder, "tracked", 17, kind)  # an odd number: shards of 9 and 8
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


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


def test_all_processes_remove_the_same_samples(tracked):
    removed = [json.loads((tracked / f"rank-{rank}.json").read_text())[1] for rank in range(2)]
    values = Trace.open(tracked / "noisy" / "_forgetfilter").forgetting()
    assert removed[0] == removed[1] == np.sort(np.argsort(values)[-5:]).tolist()


def test_training_is_unchanged_on_every_process(tracked, kind, tmp_path):
    process = launch(tmp_path / "plain", "untracked", 17, kind)
    assert process.returncode == 0, process.stderr[-4000:]
    for rank in range(2):
        plain, with_tracker = (
            json.loads((folder / f"rank-{rank}.json").read_text()) for folder in (tmp_path / "plain", tracked)
        )
        assert plain[0] == with_tracker[0] and len(plain[0]) > 16
        assert plain[2] == with_tracker[2]
    for session in ("noisy", "safety"):
        plain_weights, tracked_weights = (weights(folder / f"{session}.pt") for folder in (tmp_path / "plain", tracked))
        for name, value in plain_weights.items():
            np.testing.assert_array_equal(value.numpy(), tracked_weights[name].numpy())


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_weights_equal_a_plain_loop(kind, tmp_path):
    process = launch(tmp_path / "weighted", "tracked", 16, kind, "weighted")
    assert process.returncode == 0, process.stderr[-4000:]
    trained = weights(tmp_path / "weighted" / "weighted.pt")
    expected = plain_loop(tiny_llama(), random_rows(16, seed=1), np.linspace(0, 1, 16), 2)
    for name, start in tiny_llama().named_parameters():
        moved = float((expected[name] - start.detach()).abs().max())
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-5, atol=max(5e-3 * moved, 1e-7))


@pytest.mark.slow
def test_more_processes_than_rows(tmp_path, kind):
    process = launch(tmp_path / "three", "stopping", 2, kind, processes=3)
    assert process.returncode == 0, process.stderr[-4000:]
    trace = Trace.open(tmp_path / "three" / "noisy" / "_forgetfilter")
    np.testing.assert_allclose(trace.losses()[0], reference_means(tiny_llama(), random_rows(2, seed=1)), rtol=1e-5)
    checks = json.loads((trace.folder / "early_stopping.json").read_text())
    assert [check["step"] for check in checks] == [4, 6, 8]


def test_a_failure_of_the_main_process_ends_all_processes(tmp_path):
    (tmp_path / "full" / "noisy").mkdir(parents=True)
    (tmp_path / "full" / "noisy" / "_forgetfilter").write_text("a file where the trace's folder should be")
    process = launch(tmp_path / "full", "tracked", 6)
    assert process.returncode != 0
    assert "FileExistsError" in process.stderr or "NotADirectoryError" in process.stderr


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("config", ["fsdp2", "zero2", "zero3"])
def test_sharded_weights_on_gpus(config, tmp_path):
    process = launch(tmp_path / "gpus", "tracked", 17, "gpu", config=config)
    if config != "fsdp2":
        assert "ForgetTracker cannot record here" in process.stderr
        return
    assert process.returncode == 0, process.stderr[-4000:]
    model = tiny_llama()
    model.load_state_dict(weights(tmp_path / "gpus" / "safety.pt"))
    losses = Trace.open(tmp_path / "gpus" / "noisy" / "_forgetfilter").losses()
    np.testing.assert_allclose(losses[-1], reference_means(model, random_rows(17, seed=1)), rtol=1e-4)


@pytest.mark.parametrize("sharding", [DistributedType.FSDP, DistributedType.DEEPSPEED])  # FSDP1: no FSDP2 modules
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


def test_score_on_two_processes(tmp_path, byte_tokenizer):
    model = tiny_llama(vocab_size=len(byte_tokenizer))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"the cat {i} ", "completion": "the dog ran " * (1 + i % 3)} for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "forgetfilter_callback", "score", "--noisy", str(tmp_path / "rows.jsonl"),
               "--before", str(tmp_path / "model"), "--output", str(tmp_path / "trace"), "--json"]  # fmt: skip
    process = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert process.returncode == 0, process.stderr[-4000:]
    (account,) = [
        json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")
    ]  # printed by the main process
    assert account["samples"] == 7
    trace = Trace.open(tmp_path / "trace")
    encoded = encode_rows(rows, byte_tokenizer, disable_tqdm=True)
    with preserve_state(model):
        expected = token_losses(model, encoded, disable_tqdm=True)
    np.testing.assert_allclose(trace.token_losses(Record("safety", 0)), expected, rtol=1e-5)
    assert trace.states(Record("safety", 0)).shape == (7, 32)
