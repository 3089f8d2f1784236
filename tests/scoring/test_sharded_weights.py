"""Two processes that share weights sharded by FSDP2 run equal numbers of passes through the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import random_rows, reference_losses, tiny_llama


SCRIPT = """
import os, sys
import numpy as np, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from helpers import random_rows, tiny_llama
from forgetfilter_callback import encode_rows
from forgetfilter_callback.scoring import forward_pass
from forgetfilter_callback.scoring.token_losses import token_losses

dist.init_process_group("gloo")
forward_pass._LOGITS_PER_PASS = 2 * 128
model = tiny_llama()
for layer in model.model.layers:
    fully_shard(layer, reshard_after_forward=True)
fully_shard(model, reshard_after_forward=True)  # each pass through the model gathers the output head
for count in map(int, sys.argv[2:]):
    losses = token_losses(model, encode_rows(random_rows(count), disable_tqdm=True), disable_tqdm=True)
    np.save(f"{sys.argv[1]}/{count}-{dist.get_rank()}.npy", losses)
dist.barrier()
# torch sometimes aborts a process that has run FSDP2 on the CPU while it takes itself down.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


COUNTS = [9, 1]  # with one row, the second process has none


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The losses that each of two processes has computed."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(
        [*command, str(folder / "script.py"), str(folder), *map(str, COUNTS)], check=True, env=environment,
        capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("count", COUNTS)
def test_processes_with_different_numbers_of_predictions(count, folder):
    expected = reference_losses(tiny_llama(), random_rows(count))
    for rank in range(2):
        np.testing.assert_allclose(np.load(folder / f"{count}-{rank}.npy"), expected, rtol=1e-5, atol=1e-6)
