"""Two processes (gloo, on the CPU) under each engine that divides weights or the state of the optimizer among processes."""

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
from helpers import random_rows, reference_losses, reference_means, tiny_llama
from transformers.distributed import DistributedConfig

from forgetfilter_callback import Trace
from forgetfilter_callback.trace.records import Record


SCRIPT = """
import json, os, sys, warnings
from pathlib import Path
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
import numpy as np, torch, torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import concatenate_datasets
from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker, encode_rows
from forgetfilter_callback.scoring import forward_pass
from forgetfilter_callback.scoring.token_losses import token_losses
from forgetfilter_callback.utils.model_state import preserve_state
from helpers import random_rows, tiny_llama
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

output = Path(sys.argv[1])
forward_pass._LOGITS_PER_PASS = 5 * 128  # processes need different numbers of passes through the output head
rank = int(os.environ["RANK"])

# accelerate has these engines on accelerators only; torch, transformers and DeepSpeed have them on the CPU too.
initialize, wrap = AcceleratorState.__init__, FullyShardedDataParallel.__init__
PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)

def on_cpu(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    if engine == "fsdp1":
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=1, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], use_orig_params=True,
        )
    elif engine.endswith("tp"):
        self.distributed_type = DistributedType.MULTI_GPU

AcceleratorState.__init__ = on_cpu
FullyShardedDataParallel.__init__ = lambda self, *args, **kwargs: wrap(
    self, *args, **{{**kwargs, "device_id": torch.device("cpu")}}
)

def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda name, value: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
    return {{"input_ids": pad("input_ids", 1), "labels": pad("labels", -100)}}

def training_arguments(folder):
    settings = {{"use_cpu": True}}
    if engine.startswith("zero"):
        zero = {{"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}}
        settings = {{"deepspeed": {{"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}}}}
    return TrainingArguments(str(folder), num_train_epochs=2, per_device_train_batch_size=2, learning_rate=1e-2,
                             logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **settings)

def new_model(weights=None):
    plans = {{"tp": {{"tp_plan": "auto"}}, "fsdp2": {{"fsdp_size": 2}},
              "hsdp": {{"dp_replicate_size": 2, "fsdp_size": dist.get_world_size() // 2}},
              "fsdp2+tp": {{"fsdp_size": 2, "tp_size": 2}}}}
    if engine in plans:
        from transformers.distributed import DistributedConfig
        return AutoModelForCausalLM.from_pretrained(output / "model", distributed_config=DistributedConfig(**plans[engine]))
    model = tiny_llama()
    model.load_state_dict(weights or model.state_dict())
    return model

def whole_weights(model):
    if engine == "zero3":
        import deepspeed
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {{name: parameter.detach().clone() for name, parameter in model.named_parameters()}}
    # On a mesh with one shard, `full_tensor` returns the parameter itself, which training changes.
    return {{name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
             for name, value in model.state_dict().items()}}

class ScoreOneRow(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        with preserve_state(kwargs["model"]):  # without tensor parallelism, the second process has no row
            losses = token_losses(kwargs["model"], encode_rows(random_rows(1), disable_tqdm=True), disable_tqdm=True)
        np.save(output / engine / f"one-row-{{rank}}.npy", losses)

noisy = concatenate_datasets([random_rows(11, seed=1), random_rows(1, seed=3, longest=80).map(
    lambda row: {{"input_ids": (row["input_ids"] * 80)[:80], "labels": (row["input_ids"] * 80)[:80]}}
)])  # the last row is longer than the context
safety = random_rows(8, seed=2)

def train_twice(tracked):
    tracker = ForgetTracker(record_steps=3)
    logs, weights, trained, model = [], None, [], None
    for session, rows in (("noisy", noisy), ("safety", safety)):
        args = training_arguments(output / engine / ("tracked" if tracked else "plain") / session)
        # FSDP1 refuses a model that another Trainer has wrapped.
        model = new_model(weights) if model is None or engine == "fsdp1" else model
        callbacks = [tracker, ScoreOneRow()] if tracked else []
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=callbacks)
        trainer.train()
        logs += [{{k: v for k, v in log.items() if not k.endswith(("runtime", "per_second"))}}
                 for log in trainer.state.log_history if not any(name.startswith("forgetfilter/") for name in log)]
        weights = whole_weights(trainer.model)
        trained.append(weights)
    return tracker, logs, trained, (torch.get_rng_state().sum().item(), int(np.random.get_state()[2]))

for engine in sys.argv[2:]:
    (output / engine).mkdir(exist_ok=True)
    if rank == 0 and not (output / "model").exists():
        tiny_llama().save_pretrained(output / "model")
    args = training_arguments(output / engine)
    dist.barrier()
    tracker, logs, trained, generators = train_twice(tracked=True)
    _, plain_logs, plain, plain_generators = train_twice(tracked=False)
    unchanged = all(torch.equal(one[name], other[name]) for one, other in zip(trained, plain) for name in one)
    if rank == 0:
        torch.save(trained, output / engine / "weights.pt")
    args = training_arguments(output / engine / "filtered")
    filtered = FilteredTrainer(new_model(), args, train_dataset=noisy, data_collator=collate, forgetting=tracker,
                               filter_config=FilterConfig(fraction=0.3))
    filtered.train()
    removed = np.flatnonzero(filtered.filter_result.removed).tolist()
    facts = {{"unchanged": unchanged, "logs": logs == plain_logs, "log_count": len(logs),
              "generators": generators == plain_generators, "removed": removed}}
    (output / engine / f"rank-{{rank}}.json").write_text(json.dumps(facts))
    dist.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""

DIVIDES_AT_LOAD_TIME = "dp_replicate_size" in signature(DistributedConfig).parameters

# Imported first, because it compiles an operator for minutes unless it is told not to.
DEEPSPEED = 'import deepspeed\ndeepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'


def launch(folder: Path, *engines: str, processes: int = 2, preamble: str = "") -> None:
    script = folder / "script.py"
    script.write_text(preamble + SCRIPT.format(tests=str(Path(__file__).parents[1])))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    process = subprocess.run(
        [*command, str(script), str(folder), *engines], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr[-6000:]


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    launch(folder, "zero1", "zero2", "zero3", preamble=DEEPSPEED)
    return folder


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    launch(folder, "fsdp1", *(["fsdp2", "hsdp", "tp"] if DIVIDES_AT_LOAD_TIME else []))
    return folder


@pytest.fixture(scope="module")
def on_four(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("on-four")
    launch(folder, "hsdp", "fsdp2+tp", processes=4)
    return folder


at_load_time = pytest.mark.skipif(not DIVIDES_AT_LOAD_TIME, reason="this transformers does not divide weights itself")
ENGINES = [
    pytest.param("zero", "zero1"),
    pytest.param("zero", "zero2"),
    pytest.param("zero", "zero3"),
    pytest.param("native", "fsdp1"),
    pytest.param("native", "fsdp2", marks=at_load_time),
    pytest.param("native", "hsdp", marks=at_load_time),
    pytest.param("native", "tp", marks=at_load_time),
    pytest.param("on_four", "hsdp", marks=(at_load_time, pytest.mark.slow)),
    pytest.param("on_four", "fsdp2+tp", marks=(at_load_time, pytest.mark.slow)),
]


@pytest.mark.parametrize(("group", "engine"), ENGINES)
def test_values_of_one_process_and_training_unchanged(group, engine, request):
    folder = request.getfixturevalue(group) / engine
    noisy = [*random_rows(11, seed=1), _long_row()]
    trace = Trace.open(folder / "tracked" / "noisy" / "_forgetfilter")
    model = tiny_llama()
    expected = {Record("noisy", 0): reference_means(model, noisy)}
    weights = torch.load(folder / "weights.pt", weights_only=True)
    for session_weights, session in zip(weights, ("noisy", "safety"), strict=True):
        model.load_state_dict(session_weights, strict=False)  # parameters only under ZeRO-3
        last = max(record.step for record in trace.records() if record.session == session)
        expected[Record(session, last)] = reference_means(model, noisy)
    expected[Record("safety", 0)] = expected[max(expected, key=lambda record: (record.session == "noisy", record.step))]
    records = trace.records()
    for record, means in expected.items():
        np.testing.assert_allclose(trace.losses()[records.index(record)], means, rtol=1e-5)
    model.load_state_dict(weights[0], strict=False)
    one_row = reference_losses(model, random_rows(1))
    for rank in range(2):
        np.testing.assert_allclose(np.load(folder / f"one-row-{rank}.npy"), one_row, rtol=1e-5, atol=1e-6)
        facts = json.loads((folder / f"rank-{rank}.json").read_text())
        assert facts["unchanged"] and facts["logs"] and facts["generators"] and facts["log_count"] >= 8
        assert facts["removed"] == np.sort(np.argsort(trace.forgetting())[-4:]).tolist()


def _long_row() -> dict[str, list[int]]:
    tokens = (random_rows(1, seed=3, longest=80)[0]["input_ids"] * 80)[:64]  # as far as the context goes
    return {"input_ids": tokens, "labels": tokens}
