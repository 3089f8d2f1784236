"""`forgetfilter run` on two processes of the CPU, under `torchrun` and `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers import call, reference_means, run_options, texts
from transformers import LlamaForCausalLM

from forgetfilter_callback import FilterResult, Trace, encode_rows


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


def launch(launcher: list[str], *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "forgetfilter_callback", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_a_run_on_two_processes(files, tmp_path, byte_tokenizer):
    options = [*run_options(files, tmp_path / "out"), "--training", "per_device_train_batch_size=2", "--resume"]
    process = launch(TORCHRUN, "run", *options, "--fraction", 0.25, "--refit", "--json")
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


def test_the_cost_is_estimated_for_two_processes(files, tmp_path):
    options = [*run_options(files, tmp_path / "out"), "--max-length", 8]
    process = launch(TORCHRUN, "run", *options, "--dry-run", "--json")
    assert process.returncode == 0, process.stderr[-4000:]
    for source in (files["noisy"], files["safety"]):  # read by the main process only
        truncated = [line for line in process.stderr.splitlines() if line.startswith(f"{source}: ")]
        assert len(truncated) == 1 and "truncated on the right, to 8 tokens" in truncated[0]
    cost = json.loads(process.stdout)
    assert (cost["steps"], cost["safety_steps"]) == (4 * 2, 2 * 1)  # 2 × 4 rows a step


def _rows_in_both_sets(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    return {**files, "safety": files["noisy"]}


def _no_file(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    return {**files, "noisy": folder / "nowhere.jsonl"}


def _other_rows_in_the_folder(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    Dataset.from_list(texts(12, seed=77)).to_json(folder / "others.jsonl")
    scored = ("score", "--noisy", folder / "others.jsonl", "--before", files["model"])
    assert call(*scored, "--output", folder / "out" / "_forgetfilter").exit_code == 0
    return files


@pytest.mark.parametrize(
    ("launcher", "prepare", "sentence"),
    [
        (TORCHRUN, _rows_in_both_sets, "12 of 12 safe rows are also in the noisy set"),
        (ACCELERATE, _no_file, "nowhere.jsonl does not exist"),
        (TORCHRUN, _other_rows_in_the_folder, "contains a run on other rows"),
    ],
)
def test_an_error_of_the_main_process_ends_both_with_its_sentence(launcher, prepare, sentence, files, tmp_path):
    given = prepare(files, tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    process = launch(launcher, "run", *run_options(given, tmp_path / "out"))
    assert process.returncode == 1  # that of the launcher
    errors = [line for line in process.stderr.splitlines() if line.startswith("forgetfilter: ")]
    assert len(errors) == 2 and errors[0] == errors[1] and sentence in errors[0], process.stderr[-4000:]
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
