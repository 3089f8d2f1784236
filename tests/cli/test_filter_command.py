"""`forgetfilter filter`: decisions, records and outputs."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import call, refused, run_options, texts, tiny_llama

from forgetfilter_callback import FilterConfig, FilteredTrainer, FilterResult, ReviewQueue, Trace, encode_rows
from forgetfilter_callback.cli.demo_data import trainable
from forgetfilter_callback.data.load_rows import load_rows
from forgetfilter_callback.data.tokenizers import padding_collator
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.filtering import find_forgotten
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.filtering.review_decision import ReviewDecision
from forgetfilter_callback.pipeline.outputs import filter_rows
from forgetfilter_callback.reports import review_page
from forgetfilter_callback.reports.review_page import write_review_page


def test_moved_rows_must_be_given_again(files, tmp_path):
    moved = tmp_path / "noisy.jsonl"
    moved.write_text(files["noisy"].read_text())
    model = ("--before", files["model"], "--after", files["model"], "--output", tmp_path / "trace")
    assert call("score", "--noisy", moved, *model).exit_code == 0
    moved.rename(tmp_path / "elsewhere.jsonl")
    filtered = ("filter", tmp_path / "trace", "--output", tmp_path / "f", "--threshold", 0.5)
    result = call(*filtered)
    assert result.exit_code == 2 and "which does not exist. Pass the noisy set" in result.output
    assert call(*filtered, "--noisy", tmp_path / "elsewhere.jsonl").exit_code == 0


def test_step_selects_a_record_of_the_safety_session(files, tmp_path):
    assert call("run", *run_options(files, tmp_path / "out"), "--record-steps", 1, "--fraction", 0.25).exit_code == 0
    trace = Trace.open(tmp_path / "out" / "_forgetfilter")
    steps = [record.step for record in trace.records() if record.session == "safety"]
    result = call("show", tmp_path / "out", "--step", steps[-1] + 1)
    assert result.exit_code == 2 and f"no record at step {steps[-1] + 1}" in result.output
    assert "measured from step 0" in call("show", tmp_path / "out", "--step", 0).output
    for step in (steps[1], steps[-1]):
        output, fraction = tmp_path / f"at-{step}", ("--step", step, "--fraction", 0.25)
        shown = call("show", tmp_path / "out", *fraction, "--json")
        assert call("filter", tmp_path / "out", "--output", output, *fraction).exit_code == 0
        result, values = FilterResult.load(output / "filter_result"), trace.forgetting(step=step)
        np.testing.assert_array_equal(result.values, values)
        assert json.loads(shown.stdout)["threshold"] == result.threshold and result.step == step
        assert f"| safety session | step {step} |" in (output / "card.md").read_text()
        printed = " ".join(call("show", tmp_path / "out", *fraction).output.split())  # the terminal wraps long lines
        assert f"safety session, step 0 to step {step}." in printed


def test_filter_and_filtered_trainer_agree_on_a_decision(finished, files, tmp_path, byte_tokenizer, make_args):
    output, _ = finished
    trace = Trace.open(output / "_forgetfilter")
    values = trace.forgetting("loss")
    ids = trace.rows.ids.to_pylist()
    phi = float(np.sort(values)[-3])
    most, least = int(values.argmax()), int(values.argmin())
    decision = tmp_path / "review_decision.json"
    overrides = {ids[most]: "keep", ids[least]: "remove"}
    decision.write_text(
        json.dumps({"measure": "loss", "threshold": phi, "overrides": overrides, "trace": trace.identity()})
    )
    result = call("filter", output, "--decision", decision, "--output", tmp_path / "filtered")
    assert result.exit_code == 0, result.output
    expected = (set(np.flatnonzero(values > phi).tolist()) - {most}) | {least}
    loaded = FilterResult.load(tmp_path / "filtered" / "filter_result")
    assert set(np.flatnonzero(loaded.removed).tolist()) == expected and loaded.overrides == overrides
    encoded = encode_rows(load_rows(files["noisy"]), byte_tokenizer, disable_tqdm=True)
    rows = [encoded.sample(index) for index in range(len(encoded))]
    dataset = Dataset.from_list(
        [
            {"input_ids": tokens.tolist(), "labels": np.where(loss_mask, tokens, -100).tolist()}
            for tokens, loss_mask in rows
        ]
    )
    trainer = FilteredTrainer(
        tiny_llama(vocab_size=len(byte_tokenizer)), make_args(), train_dataset=dataset,
        forgetting=output / "_forgetfilter", filter_config=FilterConfig(decision=decision),
    )  # fmt: skip
    assert set(np.flatnonzero(trainer.filter_result.removed).tolist()) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a reviewer's decision"),
        ('{"measure": "loss", "threshold": 1}', "is not a reviewer's decision"),
        (
            '{"measure": "other", "threshold": 1, "overrides": {}, "trace": "x"}',
            '"measure" must be one of combined, loss',
        ),
        ('{"measure": "loss", "threshold": "high", "overrides": {}, "trace": "x"}', '"threshold" a number or null'),
        ('{"measure": "loss", "threshold": 1, "overrides": {"a": "burn"}, "trace": "x"}', '"keep" or "remove"'),
        ('{"measure": "loss", "threshold": 1, "overrides": {}, "trace": "x"}', "another trace"),
    ],
)
def test_invalid_decision_files_are_refused(content, said, finished, tmp_path):
    file = tmp_path / "review_decision.json"
    file.write_text(content)
    result = call("filter", finished[0], "--decision", file, "--output", tmp_path / "out")
    assert result.exit_code == 2 and said in result.output and not (tmp_path / "out").exists()


def test_every_entry_point_checks_nats_per_unit(finished, files, tmp_path, byte_tokenizer, make_args, monkeypatch):
    values = np.array([1.5, 1.6, 0.1, 0.2] * 3)

    def decided(folder: Path) -> dict[str, str]:
        trace = Trace.open(finished[0] / "_forgetfilter")
        model = tiny_llama(vocab_size=len(byte_tokenizer))
        rows = trainable(list(load_rows(files["noisy"])), byte_tokenizer)
        trainer = FilteredTrainer(model, make_args(folder.name), train_dataset=rows, forgetting=str(trace.folder),
                                  data_collator=padding_collator(byte_tokenizer))  # fmt: skip
        return {
            "trainer": trainer.filter_result.reason,
            "page": write_review_page(trace, folder / "page.html", byte_tokenizer).reason,
            "filter": filter_rows(trace, folder / "out").reason,
            "show": json.loads(call("show", finished[0], "--json").stdout)["reason"],
            "run": json.loads(call("run", *run_options(files, folder / "run"), "--json").stdout)["reason"],
        }

    def set_nats(nats: float) -> None:
        monkeypatch.setattr(find_forgotten, "compute_forgetting", lambda *arguments: (values, nats))
        monkeypatch.setattr(review_page, "compute_forgetting_by_record", lambda *arguments: (values[None], nats))

    set_nats(1.2)
    assert all(
        reason.startswith("the rows above φ are apart from the rest") for reason in decided(tmp_path / "apart").values()
    )
    set_nats(0.2)
    assert all("less likely by only 0.20 nats" in reason for reason in decided(tmp_path / "not").values())


def test_a_decision_cannot_be_combined_with_other_settings(finished, tmp_path):
    trace = Trace.open(finished[0] / "_forgetfilter")
    file = tmp_path / "review_decision.json"
    review = {"measure": "loss", "threshold": None, "overrides": {}, "trace": trace.identity()}
    file.write_text(json.dumps(review))
    assert ReviewDecision.load(file) == ReviewDecision(**review)
    with pytest.raises(ValueError, match="Pass either `decision`, or `measure`, `threshold`, `fraction` and `step`"):
        FilterConfig(fraction=0.1, decision=file)
    refused(
        call("filter", finished[0], "--decision", file, "--fraction", 0.1, "--output", tmp_path / "out"),
        "Pass either `--decision`, or",
    )
    assert not (tmp_path / "out").exists()
    assert not filter_rows(trace, tmp_path / "out", FilterConfig(decision=file)).removed.any()
    with pytest.raises(DecisionError, match="not in this set"):
        filter_by_values(trace.rows.ids, trace.forgetting("loss"), FilterConfig("loss"), overrides={"nobody": "keep"})


@pytest.mark.parametrize("name", ["removed.jsonl", "card.md", "values.parquet", "filter_result.json"])
def test_outputs_are_written_all_or_not_at_all(name, finished, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert call("filter", finished[0], "--fraction", 0.2, "--output", output).exit_code == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    real = Path.open

    def full(file: Path, mode: str = "r", *arguments, **more):
        if name in file.name and mode == "rb+":  # opened for fsync
            raise OSError(28, "No space left on device")
        return real(file, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    result = call("filter", finished[0], "--fraction", 0.6, "--output", output)
    assert result.exit_code == 1 and "No space left" in result.output
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}


def test_filter_refuses_rows_of_another_trace(finished_run, files, tmp_path):
    Dataset.from_list(texts(12, seed=77)).to_json(tmp_path / "others.jsonl")
    refused(
        call("filter", finished_run, "--noisy", tmp_path / "others.jsonl", "--output", tmp_path / "out"),
        "not the rows that were tracked",
    )
    assert not (tmp_path / "out").exists()


def test_nothing_is_removed_when_the_model_diverged(files, tmp_path, byte_tokenizer):
    model = tiny_llama(vocab_size=len(byte_tokenizer))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    model.save_pretrained(tmp_path / "diverged")
    byte_tokenizer.save_pretrained(tmp_path / "diverged")
    command = ("score", "--noisy", files["noisy"], "--before", files["model"], "--after", tmp_path / "diverged",
               "--output", tmp_path / "scored")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # "Mean of empty slice"
        scored, as_json = call(*command), call(*command, "--json")
    assert scored.exit_code == as_json.exit_code == 0, scored.output
    before, after, written = scored.stdout.splitlines()  # without a next step
    assert before.endswith("nats per token over 12 rows") and written.startswith("Wrote the trace to")
    assert after == "after: no row has a finite loss. Check this model: its training may have diverged."
    means = json.loads(as_json.stdout, parse_constant=pytest.fail)["mean_loss"]  # called for NaN
    assert means["before"] > 0 and means["after"] is None
    refused(call("filter", tmp_path / "scored", "--output", tmp_path / "out"), "finite")
    assert not (tmp_path / "out").exists()
    doctor = call("doctor", tmp_path / "scored")
    assert doctor.exit_code == 0 and "not finite" in doctor.output


ROWS_AS_THEY_CAME = [
    {"prompt": "the cat", "completion": "2021-03-01", "phone": "+4915"},
    {"prompt": "the dog", "completion": "007", "phone": "0"},
    {"prompt": "the mat", "completion": "None", "phone": "NA"},
    {"prompt": "the man", "completion": "1.10", "phone": ""},
]


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_rows_go_out_as_they_came(extension, files, tmp_path):
    """Texts that look like dates, numbers or missing values; in JSON also keys that only one row has."""
    rows, noisy = [*ROWS_AS_THEY_CAME], tmp_path / f"noisy.{extension}"
    if extension == "parquet":
        Dataset.from_list(rows).to_parquet(noisy)
    elif extension == "csv":
        noisy.write_text("prompt,completion,phone\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        rows.append({"prompt": "the", "completion": "end", "only": [{"a": None}, "2021-03-01"]})
        noisy.write_text(json.dumps(rows) if extension == "json" else "\n".join(map(json.dumps, rows)))
    model = ("--before", files["model"], "--after", files["model"], "--output", tmp_path / "trace")
    assert call("score", "--noisy", noisy, *model).exit_code == 0
    assert call("filter", tmp_path / "trace", "--output", tmp_path / "out", "--threshold", 0.5).exit_code == 0
    assert [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()] == rows


def test_verdicts_that_a_filter_does_not_use_are_named(finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    trace = Trace.open(output / "_forgetfilter")
    by_forgetting = np.argsort(-trace.forgetting())
    queue = ReviewQueue(trace)
    queue.add({int(by_forgetting[0]): "unsafe", int(by_forgetting[1]): "safe", int(by_forgetting[-1]): "unsafe"})
    folder = trace.folder / "review"
    to_filter = f"Next: forgetfilter filter {output} --reviewed {folder} --output reviewed"
    for threshold, differing in (("auto", None), (1000, 2), (float(np.sort(trace.forgetting())[-2]), 1)):
        result = call("filter", output, "--output", tmp_path / "filtered", "--threshold", threshold)
        assert threshold == "auto" or f"The filter differs from {differing} of 3 verdicts in {folder}." in result.stderr
        assert threshold == "auto" or f"pass `--reviewed {folder}` instead." in result.stderr
        assert (to_filter in result.stdout) == (threshold in ("auto", 1000)), result.output
    decision = tmp_path / "review_decision.json"
    decision.write_text(
        json.dumps({"measure": "loss", "threshold": 1000, "overrides": {}, "trace": trace.identity("loss")})
    )
    for command in ("filter", "report"):
        named = call(command, output, "--output", tmp_path / f"{command}.out", "--decision", decision)
        assert named.exit_code == 0, named.output
        assert f"The filter differs from 2 of 3 verdicts in {folder}." in named.stderr
    reviewed = call("filter", output, "--output", tmp_path / "filtered", "--reviewed", folder)
    assert reviewed.stderr == "" and "Next: finetune the base model" in reviewed.stdout, reviewed.output


@pytest.mark.parametrize(
    ("threshold", "own_folder", "expected"),
    [
        ("auto", False, "Next: forgetfilter review {output}\n"),
        ("fdr", False, "Next: forgetfilter review {output} --random-fraction 1\n"),
        ("auto", True, "Next: finetune the base model on"),
    ],
)
def test_after_a_review_that_removes_nothing_more_rows_are_reviewed(
    finished, tmp_path, threshold, own_folder, expected
):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    trace = Trace.open(output / "_forgetfilter")
    folder = tmp_path / "own" if own_folder else trace.folder / "review"
    ReviewQueue(trace, folder).add({0: "safe"})
    options = ("--reviewed", folder, "--threshold", threshold)
    result = call("filter", output, "--output", tmp_path / "filtered", *options)
    assert "Removed 0 of 12 rows" in result.stdout
    assert expected.format(output=output) in result.stdout


def test_verdicts_that_cannot_be_read_stop_only_a_filter_that_needs_them(finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    review = output / "_forgetfilter" / "review"
    review.mkdir()
    (review / "verdicts.jsonl").write_text("[1]\n")
    filtered = ("filter", output, "--output", tmp_path / "filtered")
    assert call(*filtered, "--fraction", 0.25).exit_code == call("show", output).exit_code == 0
    refused(call(*filtered, "--reviewed", review), "line 1 holds no verdict")


def test_recorded_rows_that_are_gone_from_the_file_are_named(finished, files, tmp_path, caplog):
    lines = files["noisy"].read_text().splitlines(keepends=True)
    fewer, shuffled = tmp_path / "fewer.jsonl", tmp_path / "shuffled.jsonl"
    fewer.write_text("".join(lines[3:]))
    shuffled.write_text("".join(reversed(lines)))
    for rows, message in ((fewer, f"3 of 12 recorded rows are not in {fewer}."), (shuffled, "")):
        caplog.clear()
        result = call("filter", finished[0], "--noisy", rows, "--fraction", 0.25, "--output", tmp_path / rows.stem)
        assert result.exit_code == 0 and message in caplog.text, result.output
        assert ("recorded row" in caplog.text) == bool(message)


def test_an_output_folder_that_is_a_file_is_refused(finished, files):
    rows = files["noisy"].read_text()
    options = run_options(files, files["noisy"])
    for command in (("filter", finished[0], "--output", files["noisy"]), ("run", *options)):
        refused(call(*command), f"{files['noisy']} is a file. Choose a folder for the output.")
    assert files["noisy"].read_text() == rows
