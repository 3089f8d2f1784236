"""A process that runs out of memory in a forward pass over weights that another process shares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import random_rows, reference_losses, tiny_llama


SCRIPT = """
import logging, os, sys
import numpy as np, torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from helpers import random_rows, tiny_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from forgetfilter_callback import encode_rows
from forgetfilter_callback.scoring import forward_pass
from forgetfilter_callback.scoring.token_losses import token_losses

logging.basicConfig(format="[%(process)d] %(message)s")
dist.init_process_group("gloo")
forward_pass._LOGITS_PER_PASS = 2 * 128

def run_out_of_memory(module, args):
    if dist.get_rank() == 1 and args[0].shape[:2].numel() > 24:
        raise torch.OutOfMemoryError("CUDA out of memory.")

def sharded(model, engine):
    if engine == "fsdp1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    if engine == "whole":  # as under DDP
        return model
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=True)

for case in sys.argv[2:]:
    engine, _, place = case.partition(":")
    model = tiny_llama()
    failing = {"layer": model.model.layers[0].mlp, "gathering": model.model.layers[1], "norm": model.model.norm}[place]
    model = sharded(model, engine)
    failing.register_forward_pre_hook(run_out_of_memory, prepend=True)
    rows = encode_rows(random_rows(9), disable_tqdm=True)
    np.save(f"{sys.argv[1]}/{case}-{dist.get_rank()}.npy", token_losses(model, rows, disable_tqdm=True))
dist.barrier()
# torch sometimes aborts a process that has run FSDP2 on the CPU while it takes itself down.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def launch(folder: Path, *cases: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [*command, str(folder / "script.py"), str(folder), *cases], env=environment, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip


def test_batches_are_halved_on_all_processes(tmp_path):
    cases = ["whole:layer", "fsdp2:layer", "fsdp2:gathering", "fsdp2:norm"]
    process = launch(tmp_path, *cases)
    assert process.returncode == 0, process.stderr[-4000:]
    expected = reference_losses(tiny_llama(), random_rows(9))
    for case in cases:
        for rank in range(2):
            np.testing.assert_allclose(np.load(tmp_path / f"{case}-{rank}.npy"), expected, rtol=1e-5, atol=1e-6)
    assert process.stderr.count("does not fit into the device's memory") == len(cases)  # said by the main process


def test_without_a_way_to_recover_all_processes_end(tmp_path):
    process = launch(tmp_path, "fsdp1:layer")
    assert process.returncode != 0
    assert "Scoring does not fit into the memory of process 1" in process.stderr
    assert "Lower `batch_tokens` of the `ForgetTracker`" in process.stderr
