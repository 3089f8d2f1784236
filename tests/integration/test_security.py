"""Rows, traces and settings come from strangers: nothing in them runs, reads or writes what it should not."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import HOSTILE, call, hostile_trace, run_options, texts, tiny_llama

import forgetfilter_callback
from forgetfilter_callback import FilterConfig, Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.reports.dataset_card import dataset_card


PACKAGE = Path(forgetfilter_callback.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "ctypes"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.load",
    "np.load",
}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "weights_only"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.name)
def test_the_package_executes_nothing_that_it_reads(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, ast.unparse(node)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert not given.keys() & FORBIDDEN_ARGUMENTS, ast.unparse(node)
            # Without the argument, transformers asks at the terminal: "Do you wish to run the custom code? [y/N]"
            if re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)):
                assert given["trust_remote_code"] == "False", ast.unparse(node)


@pytest.fixture
def files(tmp_path, byte_tokenizer) -> dict[str, Path]:
    """A tiny model, and rows with hostile texts and ids."""
    tiny_llama(vocab_size=len(byte_tokenizer)).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {**row, "id": f"../../{index}", "completion": f" {HOSTILE[index % len(HOSTILE)]}{row['completion']}"}
        for index, row in enumerate(texts(12, seed=1))
    ]
    Dataset.from_list(rows).to_json(tmp_path / "noisy.jsonl")
    Dataset.from_list(texts(6, seed=2)).to_json(tmp_path / "safety.jsonl")
    return {name: tmp_path / (name if name == "model" else f"{name}.jsonl") for name in ("model", "noisy", "safety")}


def test_hostile_rows_do_not_escape_the_output_folder(files, tmp_path, monkeypatch, caplog):
    """Ids are paths; texts are markup, escape sequences and formulas; the environment holds a token."""
    secret = "hf_abcdefghijklmnopqrstuvwxyz012345"
    monkeypatch.setenv("HF_TOKEN", secret)
    caplog.set_level(logging.DEBUG)
    output = tmp_path / "deep" / "out"
    before = {file for file in tmp_path.rglob("*") if output not in file.parents}
    result = call("run", *run_options(files, output), "--fraction", 0.25)
    assert result.exit_code == 0, result.output
    new = {file for file in tmp_path.rglob("*") if output not in file.parents} - before
    assert new == {output.parent, output}
    kept, removed = (
        [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
        for name in ("kept", "removed")
    )
    assert sorted(row["note"] for row in kept + removed) == list(range(12))
    given = Dataset.from_json(str(files["noisy"]))
    assert {row["completion"] for row in kept + removed} == set(given["completion"])
    written = [file for file in output.rglob("*") if file.is_file()]
    assert len(written) > 8 and not any(secret.encode() in file.read_bytes() for file in written)
    assert secret not in result.output and secret not in caplog.text
    assert (
        "\x1b[31m" not in result.output and "\x07" not in result.output
    )  # other escape sequences come from progress bars


def test_symlinks_are_not_followed(tmp_path, byte_tokenizer):
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=30)
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"the cat {i} ", "completion": f"{HOSTILE[i % 10]} the dog {i}"} for i in range(30)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    victim, output = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    (output / "filter_result").mkdir(parents=True)
    for name in (
        "kept.jsonl",
        "removed.jsonl",
        "card.md",
        "filter_result/filter_result.json",
        "filter_result/values.parquet",
    ):
        (output / name).symlink_to(victim)
    result = call("filter", trace.folder, "--measure", "loss", "--fraction", 0.3, "--noisy", tmp_path / "rows.jsonl",
                  "--tokenizer", tmp_path / "tokenizer", "--output", output)  # fmt: skip
    assert result.exit_code == 2 and "no earlier run or filter has written it" in result.output
    assert victim.read_text() == "mine" and sum(file.is_symlink() for file in output.rglob("*")) == 5


def test_a_trace_does_not_read_files_outside_its_folder(tmp_path, byte_tokenizer):
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=30)
    (tmp_path / "safety-00000099.parquet").write_bytes(
        (trace.folder / "records" / "safety-00000008.parquet").read_bytes()
    )
    for name in ("safety-..parquet", "safety-0x10.parquet", "..-1.parquet", "other-00000001.parquet"):
        (trace.folder / "records" / name).write_bytes(b"")
    assert len(Trace.open(trace.folder).records()) == 5
    with pytest.raises(TraceError, match="no record at step"):
        trace.forgetting("loss", step=99)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch pwned']", "a: !!python/name:os.system"])
def test_yaml_is_loaded_safely(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    result = call("run", "--config", "config.yaml")
    assert result.exit_code == 2 and "cannot be read" in result.output and not (tmp_path / "pwned").exists()


def test_control_characters_in_a_trace_are_not_printed(tmp_path, byte_tokenizer):
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=30)
    (trace.folder / "records" / "\x1b[2Jevil").write_bytes(b"")
    result = call("doctor", trace.folder)
    assert result.exit_code == 2 and "evil is not a record" in result.output and "\x1b" not in result.output
    manifest = json.loads((trace.folder / "manifest.json").read_text())
    (trace.folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "\x1b]0;pwned\x07"}))
    for command in ("doctor", "show"):
        result = call(command, trace.folder)
        assert result.exit_code == 2 and "pwned" in result.output
        assert "\x1b" not in result.output and "\x07" not in result.output


def test_the_card_escapes_a_hostile_model_name(tmp_path, byte_tokenizer):
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=30)
    trace.manifest["model"] = "evil | model\n\n# Approved\n<script>alert(1)</script>[x](javascript:alert(2))"
    card = dataset_card(filter_by_values(trace.rows.ids, trace.forgetting("loss"), FilterConfig("loss")), trace)
    (line,) = [line for line in card.splitlines() if line.startswith("| model")]
    assert line == "| model | `evil \\| model  # Approved <script>alert(1)</script>[x](javascript:alert(2))` |"
    assert card.count("\n#") == 0 and card.count("<script>") == 1  # inside a code span
