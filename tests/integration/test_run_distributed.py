"""`forgetfilter run` on two processes of the CPU, under `torchrun` and `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers import call, reference_losses, reference_means, run_options, texts, tiny_llama
from transformers import LlamaForCausalLM

from forgetfilter_callback import FilterResult, Trace, encode_rows
from forgetfilter_callback.trace.records import Record


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


# Runs several commands one after another, because each start of two processes takes long.
COMMANDS = """
import atexit, json, os, sys
from pathlib import Path
from forgetfilter_callback.cli.main import main

folder = Path(sys.argv[1])


@atexit.register
def at_the_end():
    from torch import distributed
    (folder / f"is-connected-{os.environ['RANK']}").write_text(str(distributed.is_initialized()))


for name, arguments in json.loads((folder / "commands.json").read_text()).items():
    file = folder / f"{name}-{os.environ['RANK']}"
    for number in (1, 2):  # standard output and standard error
        os.dup2(os.open(f"{file}.{number}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["forgetfilter", *arguments]
    try:
        main()
    except SystemExit as stop:
        Path(f"{file}.code").write_text(str(stop.code))
"""


def launch(launcher: list[str], *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_a_run_on_two_processes(files, tmp_path, byte_tokenizer):
    options = [*run_options(files, tmp_path / "out"), "--training", "per_device_train_batch_size=2", "--resume"]
    process = launch(
        ACCELERATE, "-m", "forgetfilter_callback", "run", *options, "--fraction", 0.25, "--refit", "--json"
    )
    assert process.returncode == 0, process.stderr[-4000:]
    account = json.loads(process.stdout)  # printed by the main process only
    sessions = ("noisy", "safety", "filtered")  # each warning is logged by the main process only
    for folder in (tmp_path / "out" / "sessions" / session for session in sessions):
        assert process.stderr.count(f"There is no checkpoint in {folder}, so this training run starts") == 1
    assert (account["samples"], account["removed"]) == (12, 3)
    trace = Trace.open(tmp_path / "out" / "_forgetfilter")
    rows = encode_rows(texts(12, seed=1), byte_tokenizer, disable_tqdm=True).as_dataset()
    means = reference_means(LlamaForCausalLM.from_pretrained(files["model"]), rows)
    np.testing.assert_allclose(trace.losses()[0], means, rtol=1e-5)
    assert [entry["max_steps"] for entry in trace.manifest["sessions"]] == [4 * 3, 2 * 2]  # 2 × 2 rows a step
    removed = sorted(np.argsort(-trace.forgetting())[:3].tolist())
    result = FilterResult.load(tmp_path / "out" / "filter_result")
    assert np.flatnonzero(result.removed).tolist() == removed
    lines = files["noisy"].read_text().splitlines()
    assert (tmp_path / "out" / "removed.jsonl").read_text().splitlines() == [lines[index] for index in removed]
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "model" / "tokenizer.json").exists()
    # The folder is free again, also for a single process.
    assert call("filter", tmp_path / "out", "--output", tmp_path / "again", "--fraction", 0.5).exit_code == 0


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@dataclass
class Ended:
    """A command that two processes have run: what each of them returned and wrote."""

    codes: list[str]
    stdout: list[str]
    stderr: list[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def commands(files, folder) -> dict[str, Ended]:
    scored = ("score", "--noisy", files["noisy"], "--before", files["model"])
    Dataset.from_list(texts(12, seed=77)).to_json(folder / "others.jsonl")
    others = ("score", "--noisy", folder / "others.jsonl", "--before", files["model"])
    assert call(*others, "--output", folder / "others" / "_forgetfilter").exit_code == 0
    before = contents(folder / "others")
    arguments = {
        "score": [*scored, "--output", folder / "scored", "--json"],
        "dry run": ["run", *run_options(files, folder / "out"), "--max-length", 8, "--dry-run", "--json"],
        "rows in both sets": ["run", *run_options({**files, "safety": files["noisy"]}, folder / "out")],
        "no file": ["run", *run_options({**files, "noisy": folder / "nowhere.jsonl"}, folder / "out")],
        "other rows in the folder": ["run", *run_options(files, folder / "others")],
    }
    (folder / "commands.json").write_text(json.dumps({name: [*map(str, each)] for name, each in arguments.items()}))
    (folder / "commands.py").write_text(COMMANDS)
    process = launch(TORCHRUN, folder / "commands.py", folder)
    assert process.returncode == 0, process.stderr[-4000:]
    assert contents(folder / "others") == before and not (folder / "out").exists()
    return {
        name: Ended(
            *([(folder / f"{name}-{rank}.{kind}").read_text() for rank in (0, 1)] for kind in ("code", "1", "2"))
        )
        for name in arguments
    }


def test_score_on_two_processes(commands, folder, files, byte_tokenizer):
    ended = commands["score"]
    assert ended.codes == ["0", "0"], ended.stderr
    assert json.loads(ended.stdout[0])["samples"] == 12 and ended.stdout[1] == ""  # printed by the main process only
    rows = encode_rows(texts(12, seed=1), byte_tokenizer, disable_tqdm=True).as_dataset()
    expected = reference_losses(tiny_llama(vocab_size=len(byte_tokenizer)), rows)
    record, trace = Record("safety", 0), Trace.open(folder / "scored")
    np.testing.assert_allclose(trace.token_losses(record), expected, rtol=1e-5)
    alone = ("score", "--noisy", files["noisy"], "--before", files["model"], "--output", folder / "alone")
    assert call(*alone).exit_code == 0
    states = Trace.open(folder / "alone").states(record)
    assert states.shape == (12, 32)
    np.testing.assert_allclose(trace.states(record), states, rtol=2e-3, atol=1e-5)  # half precision


def test_processes_leave_their_group_at_the_end(commands, folder):
    """A thread of the group can abort a process that ends without leaving it."""
    assert [(folder / f"is-connected-{rank}").read_text() for rank in (0, 1)] == ["False", "False"]


def test_the_cost_is_estimated_for_two_processes(commands, files):
    ended = commands["dry run"]
    assert ended.codes == ["0", "0"], ended.stderr
    for source in (files["noisy"], files["safety"]):  # read by the main process only
        truncated = [line for line in "".join(ended.stderr).splitlines() if line.startswith(f"{source}: ")]
        assert len(truncated) == 1 and "truncated on the right, to 8 tokens" in truncated[0]
    cost = json.loads(ended.stdout[0])
    assert (cost["steps"], cost["safety_steps"]) == (4 * 2, 2 * 1) and ended.stdout[1] == ""  # 2 × 4 rows a step
    assert cost["peak_bytes"] is cost["seconds"] is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no file", "nowhere.jsonl does not exist"),
        ("rows in both sets", "12 of 12 safe rows are also in the noisy set (rows 0, 1, 2, 3, 4 and 7 more of "),
        ("other rows in the folder", "contains a run on other rows"),
    ],
)
def test_an_error_of_the_main_process_is_that_of_both(name, sentence, commands):
    ended = commands[name]
    assert ended.codes == ["2", "2"]
    lines = [[line for line in stderr.splitlines() if line.startswith("forgetfilter: ")] for stderr in ended.stderr]
    assert len(lines[0]) == 1 and lines[0] == lines[1] and sentence in lines[0][0], ended.stderr
