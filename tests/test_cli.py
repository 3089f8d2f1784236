"""Every command from the outside: files in, files out, exit codes, and what a script may read."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import forgetfilter_callback.checkpoints
import numpy as np
import pytest
import yaml
from conftest import hostile_trace, texts, tiny_llama
from datasets import Dataset, load_from_disk
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, GPT2Config, MambaConfig
from typer.testing import CliRunner, Result

from forgetfilter_callback import FilteredTrainer, FilterResult, RunConfig, Trace, encode_rows
from forgetfilter_callback.cli.app import app
from forgetfilter_callback.cli.demo_data import trainable
from forgetfilter_callback.data.loading import load_rows
from forgetfilter_callback.data.tokenizers import model_context_length
from forgetfilter_callback.errors import DataError, DecisionError
from forgetfilter_callback.filtering.find_forgotten import filter_by_values
from forgetfilter_callback.filtering.review_decision import ReviewDecision
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.pipeline.outputs import filter_rows
from forgetfilter_callback.pipeline.plan import plan
from forgetfilter_callback.reports.review_page import write_review_page
from forgetfilter_callback.scoring.token_losses import token_losses
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.model_state import preserve_state


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def settings(files: dict[str, Path], output: Path) -> list[object]:
    named = [part for name in ("model", "noisy", "safety") for part in (f"--{name}", files[name])]
    return [*named, "--output", output, "--epochs", 4, "--learning-rate", 3e-2, "--lora-r", 4]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("run") / "out"
    return output, call("run", *settings(files, output), "--fraction", 0.25, "--refit", "--json")


def test_run_parts_the_rows_and_finetunes_on_what_is_left(finished, files):
    output, result = finished
    assert result.exit_code == 0, result.output
    account = json.loads(result.stdout)
    rows = [json.loads(line) for line in files["noisy"].read_text().splitlines()]
    kept, removed = (
        [json.loads(line) for line in (output / name).read_text().splitlines()]
        for name in ("kept.jsonl", "removed.jsonl")
    )
    assert (account["samples"], account["removed"], account["kept"]) == (12, len(removed), len(kept)) == (12, 3, 9)
    values = Trace.open(output / "_forgetfilter").forgetting(account["measure"])
    most = set(np.argsort(-values)[:3].tolist())
    assert removed == [row for index, row in enumerate(rows) if index in most]
    assert kept == [row for index, row in enumerate(rows) if index not in most]
    assert (output / "model" / "adapter_model.safetensors").exists()
    assert "3 of 12 rows were removed" in (output / "card.md").read_text()


def test_the_configuration_that_a_run_wrote_runs_it_again(finished, files, tmp_path):
    output, _ = finished
    again = call("run", "--config", output / "config.yaml", "--output", tmp_path / "again", "--no-refit", "--json")
    assert again.exit_code == 0, again.output
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["learning_rate"] == 3e-2
    first, second = (Trace.open(folder / "_forgetfilter") for folder in (output, tmp_path / "again"))
    assert first.records() == second.records()
    np.testing.assert_array_equal(first.losses(), second.losses())
    assert (output / "kept.jsonl").read_bytes() == (tmp_path / "again" / "kept.jsonl").read_bytes()
    assert not (tmp_path / "again" / "model").exists()


@pytest.mark.parametrize(("safety_learning_rate", "alike"), [(3e-2, True), (9e-3, False)])
def test_s1plus_trains_like_s1_unless_told_otherwise(finished, files, tmp_path, safety_learning_rate, alike):
    flags = [*settings(files, tmp_path), "--fraction", 0.25, "--safety-learning-rate", safety_learning_rate]
    assert call("run", *flags).exit_code == 0
    first, second = (Trace.open(folder / "_forgetfilter").losses() for folder in (finished[0], tmp_path))
    np.testing.assert_array_equal(first[:2], second[:2])  # S1
    assert (first == second).all() == alike


def test_a_dry_run_says_what_it_would_cost_and_does_nothing(files, tmp_path):
    result = call("run", *settings(files, tmp_path / "out"), "--dry-run", "--json")
    cost = json.loads(result.stdout)
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    assert (cost["samples"], cost["safety_samples"], cost["steps"], cost["safety_steps"]) == (12, 6, 12, 4)
    made = RunConfig(*(str(files[name]) for name in ("model", "noisy", "safety")), output="out", record_steps=0.5)
    assert plan(made).records == 3 + 1 + 1


def test_a_run_that_cannot_tell_ends_with_3(files, tmp_path):
    flags = settings(files, tmp_path / "out")
    flags[flags.index(3e-2)] = 1e-6  # nothing is learnt, so nothing forgotten
    result = call("run", *flags)
    assert result.exit_code == 3
    assert "0 of 12 samples removed" in result.output and "nothing to remove" in result.output
    assert len((tmp_path / "out" / "kept.jsonl").read_text().splitlines()) == 12


def test_score_compares_two_checkpoints(files, tmp_path, byte_tokenizer):
    after = tiny_llama(seed=1, vocab_size=len(byte_tokenizer))
    after.save_pretrained(tmp_path / "after")
    first = call(
        "score", "--noisy", files["noisy"], "--before", files["model"], "--output", tmp_path / "trace", "--json"
    )
    assert first.exit_code == 0, first.output
    result = call("score", "--noisy", files["noisy"], "--after", tmp_path / "after", "--tokenizer", files["model"],
                  "--output", tmp_path / "trace")  # fmt: skip
    assert result.exit_code == 0, result.output
    trace = Trace.open(tmp_path / "trace")
    assert trace.records() == [Record("safety", 0), Record("safety", 1)]
    assert trace.manifest["model"] == str(files["model"])  # not the one that was scored last
    with preserve_state(after):
        rows = encode_rows(load_rows(files["noisy"]), byte_tokenizer, disable_tqdm=True)
        expected = mean_losses(token_losses(after, rows, disable_tqdm=True), rows.loss_offsets)
    np.testing.assert_allclose(trace.losses()[1], expected, rtol=1e-5)
    assert json.loads(first.stdout)["mean_loss"] == {"before": pytest.approx(trace.losses()[0].mean())}
    filtered = call("filter", tmp_path / "trace", "--fraction", 0.5, "--output", tmp_path / "filtered", "--json")
    assert filtered.exit_code == 0 and json.loads(filtered.stdout)["removed"] == 6  # it finds the rows by itself


def test_score_holds_one_model_at_a_time_and_gives_its_folder_back(files, tmp_path, monkeypatch):
    """Two may not fit, and a model that cannot be loaded is no reason to hold the folder."""
    loaded, load = [], forgetfilter_callback.checkpoints._load

    def load_one(checkpoint, device):
        gc.collect()
        assert not [model for model in loaded if model() is not None]
        model = load(checkpoint, device)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("forgetfilter_callback.checkpoints._load", load_one)
    arguments = (
        "score",
        "--noisy",
        files["noisy"],
        "--before",
        files["model"],
        "--output",
        tmp_path / "trace",
        "--after",
    )
    result = call(*arguments, tmp_path / "nothing")
    assert result.exit_code == 2 and "cannot be loaded" in result.output
    lock = Trace.lock(tmp_path / "trace")
    assert lock.lock_counter == 1  # it was free
    lock.release()
    result = call(*arguments, files["model"])
    assert result.exit_code == 0, result.output
    assert len(loaded) == 3 and Trace.open(tmp_path / "trace").manifest["model"] == str(files["model"])


def test_context_is_known_by_the_name_that_a_family_gives_it(tmp_path):
    GPT2Config(n_positions=32).save_pretrained(tmp_path / "gpt2")
    MambaConfig().save_pretrained(tmp_path / "mamba")
    assert (model_context_length(str(tmp_path / "gpt2")), model_context_length(str(tmp_path / "mamba"))) == (32, None)


def test_rows_that_were_moved_are_asked_for(files, tmp_path):
    moved = tmp_path / "noisy.jsonl"
    moved.write_text(files["noisy"].read_text())
    model = ("--before", files["model"], "--after", files["model"], "--output", tmp_path / "trace")
    assert call("score", "--noisy", moved, *model).exit_code == 0
    moved.rename(tmp_path / "elsewhere.jsonl")
    filtered = ("filter", tmp_path / "trace", "--output", tmp_path / "f", "--threshold", 0.5)
    result = call(*filtered)
    assert result.exit_code == 2 and "where nothing is now. Say where they lie: `--noisy`" in result.output
    assert call(*filtered, "--noisy", tmp_path / "elsewhere.jsonl").exit_code == 0


def test_a_record_of_s1plus_can_be_named(files, tmp_path):
    assert call("run", *settings(files, tmp_path / "out"), "--record-steps", 1, "--fraction", 0.25).exit_code == 0
    trace = Trace.open(tmp_path / "out" / "_forgetfilter")
    steps = [record.step for record in trace.records() if record.session == "safety"]
    result = call("show", tmp_path / "out", "--step", steps[-1] + 1)
    assert result.exit_code == 2 and f"no record at step {steps[-1] + 1}" in result.output
    assert "measured from step 0" in call("show", tmp_path / "out", "--step", 0).output
    for step in (steps[1], steps[-1]):
        output, fraction = tmp_path / f"at-{step}", ("--step", step, "--fraction", 0.25)
        shown = call("show", tmp_path / "out", *fraction, "--json")
        assert call("filter", tmp_path / "out", "--output", output, *fraction).exit_code == 0
        result, values = FilterResult.load(output / "decision"), trace.forgetting(step=step)
        np.testing.assert_array_equal(result.values, values)
        assert json.loads(shown.stdout)["threshold"] == result.threshold and result.step == step
        assert f"| record of S1+ | step {step} |" in (output / "card.md").read_text()
        assert f"step 0 to {step}" in call("show", tmp_path / "out", *fraction).output


def test_score_takes_an_adapter(finished, files, tmp_path, byte_tokenizer):
    adapter = finished[0] / "model"
    result = call("score", "--noisy", files["noisy"], "--before", adapter, "--output", tmp_path / "trace")
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(tiny_llama(vocab_size=len(byte_tokenizer)), adapter)
    rows = encode_rows(load_rows(files["noisy"]), byte_tokenizer, disable_tqdm=True)
    with preserve_state(model):
        expected, plain = token_losses(model, rows, disable_tqdm=True), None
        with model.disable_adapter():
            plain = token_losses(model, rows, disable_tqdm=True)
    losses = Trace.open(tmp_path / "trace").token_losses(Record("safety", 0))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert not np.allclose(losses, plain, rtol=1e-2)


def test_filter_by_a_decision_is_what_filtered_trainer_does(finished, files, tmp_path, byte_tokenizer, make_args):
    output, _ = finished
    trace = Trace.open(output / "_forgetfilter")
    values = trace.forgetting("loss")
    ids = trace.rows.ids.to_pylist()
    phi = float(np.sort(values)[-3])
    most, least = int(values.argmax()), int(values.argmin())
    decision = tmp_path / "decision.json"
    overrides = {ids[most]: "keep", ids[least]: "remove"}
    decision.write_text(
        json.dumps({"measure": "loss", "threshold": phi, "overrides": overrides, "trace": trace.identity()})
    )
    result = call("filter", output, "--decision", decision, "--output", tmp_path / "filtered")
    assert result.exit_code == 0, result.output
    expected = (set(np.flatnonzero(values > phi).tolist()) - {most}) | {least}
    loaded = FilterResult.load(tmp_path / "filtered" / "decision")
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
        forgetting=output / "_forgetfilter", decision=decision,
    )  # fmt: skip
    assert set(np.flatnonzero(trainer.filter_result.removed).tolist()) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no decision"),
        ('{"measure": "loss", "threshold": 1}', "is no decision"),
        ('{"measure": "other", "threshold": 1, "by_hand": {}, "trace": "x"}', "measure"),
        ('{"measure": "loss", "threshold": "high", "by_hand": {}, "trace": "x"}', "is no decision"),
        ('{"measure": "loss", "threshold": 1, "by_hand": {"a": "burn"}, "trace": "x"}', "'keep' or 'remove'"),
        ('{"measure": "loss", "threshold": 1, "by_hand": {}, "trace": "x"}', "another trace"),
    ],
)
def test_a_decision_that_is_none(content, said, finished, tmp_path):
    file = tmp_path / "decision.json"
    file.write_text(content)
    result = call("filter", finished[0], "--decision", file, "--output", tmp_path / "out")
    assert result.exit_code == 2 and said in result.output and not (tmp_path / "out").exists()


def test_every_way_to_decide_asks_whether_samples_became_less_likely(
    finished, files, tmp_path, byte_tokenizer, make_args, monkeypatch
):
    values = np.array([1.5, 1.6, 0.1, 0.2] * 3)
    monkeypatch.setattr(Trace, "forgetting", lambda self, measure="smoothed", step=None: values)

    def decided(folder: Path) -> dict[str, str]:
        trace = Trace.open(finished[0] / "_forgetfilter")
        model = tiny_llama(vocab_size=len(byte_tokenizer))
        rows = trainable(load_rows(files["noisy"]).to_list(), byte_tokenizer)
        trainer = FilteredTrainer(model, make_args(folder.name), train_dataset=rows, forgetting=str(trace.folder),
                                  data_collator=DataCollatorForSeq2Seq(byte_tokenizer))  # fmt: skip
        return {
            "trainer": trainer.filter_result.reason,
            "page": write_review_page(trace, folder / "page.html", byte_tokenizer).reason,
            "filter": filter_rows(trace, folder / "out").reason,
            "show": json.loads(call("show", finished[0], "--json").stdout)["reason"],
            "run": json.loads(call("run", *settings(files, folder / "run"), "--json").stdout)["reason"],
        }

    monkeypatch.setattr(Trace, "nats_per_change", lambda self, values, step=None: 1.2)
    assert all("of those above φ" in reason for reason in decided(tmp_path / "apart").values())
    monkeypatch.setattr(Trace, "nats_per_change", lambda self, values, step=None: 0.2)
    assert all("less likely by only 0.20 nats" in reason for reason in decided(tmp_path / "not").values())


def test_a_decision_beside_other_settings(finished, tmp_path):
    trace = Trace.open(finished[0] / "_forgetfilter")
    file = tmp_path / "decision.json"
    review = {"measure": "loss", "threshold": None, "overrides": {}, "trace": trace.identity()}
    file.write_text(json.dumps(review))
    assert ReviewDecision.load(file) == ReviewDecision(**review)
    with pytest.raises(DecisionError, match="give `decision`, or"):
        filter_rows(trace, tmp_path / "out", fraction=0.1, decision=file)
    assert not filter_rows(trace, tmp_path / "out", decision=file).removed.any()
    with pytest.raises(DecisionError, match="not in this set"):
        filter_by_values(trace.rows.ids, trace.forgetting("loss"), "loss", overrides={"nobody": "keep"})


def test_show_prints_no_control_characters_of_a_text(tmp_path, byte_tokenizer):
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=60)
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    result = call("show", tmp_path / "trace", "--measure", "loss", "--tokenizer", tmp_path / "tokenizer", "--head", 60)
    assert result.exit_code == 0, result.output
    assert not {"\x1b", "\x07", "\x00", "\u202e", "\u2066"} & set(result.output)
    assert "well separated" in result.output and "← φ = 0.693" in result.output
    account = json.loads(call("show", tmp_path / "trace", "--measure", "loss", "--json", "--threshold", 1.5).stdout)
    assert account["removed"] == (trace.forgetting("loss") > 1.5).sum()


def test_report_writes_a_page(finished, files, tmp_path):
    page = tmp_path / "page.html"
    result = call("report", finished[0], "--output", page, "--fraction", 0.25, "--audit-column", "unsafe")
    assert result.exit_code == 0 and "3 of 12 removed" in result.output, result.output
    data = json.loads(page.read_text().split('<script id="data" type="application/json">')[1].split("</script>")[0])
    assert [row["unsafe"] for row in data["rows"]] == [bool(i % 2) for i in range(12)]
    assert [row["prompt"] for row in data["rows"]] == [row["prompt"] for row in texts(12, seed=1)]
    text = call("report", finished[0], "--output", page, "--audit-column", "prompt")
    assert text.exit_code == 2 and "neither true/false nor numbers" in text.output
    wrong = call("report", finished[0], "--output", page, "--audit-column", "colour")
    assert wrong.exit_code == 2 and "no column 'colour'" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--model", "m", "--noisy", "n"], "--safety, --output must be given"),
        (["run", "--model", "m", "--noisy", "n", "--safety", "s", "--output", "o", "--epochs", "0"], "larger than 0"),
        (
            ["run", "--model", "m", "--noisy", "n", "--safety", "s", "--output", "o", "--fraction", "2"],
            "between 0 and 1",
        ),
        (["run", "--config", "no-such.yaml"], "cannot be read"),
        (["score", "--noisy", "n", "--output", "o"], "Name a model"),
        (["filter", "nowhere", "--output", "o"], "holds no trace"),
        (["filter", "nowhere", "--output", "o", "--threshold", "high"], "neither a number nor 'auto'"),
        (["show", "nowhere"], "holds no trace"),
        (["report", "nowhere", "--measure", "vibes"], "vibes"),
        (["dance"], "No such command"),
    ],
)
def test_bad_usage_ends_with_2_and_without_a_traceback(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.replace("│", " ").split()) and "Traceback" not in result.output
    assert not (tmp_path / "o").exists()


def test_a_configuration_with_something_else_in_it(tmp_path):
    for content, said in (("colour: red", "colour"), ("- 1", "no settings"), ("a: [", "cannot be read")):
        (tmp_path / "config.yaml").write_text(content)
        result = call("run", "--config", tmp_path / "config.yaml")
        assert result.exit_code == 2 and said in result.output


def test_failing_ends_with_1(files, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    result = call("run", *settings(files, tmp_path / "out"))
    assert result.exit_code == 1 and "Traceback" not in result.output


def test_rows_come_out_as_the_very_lines_that_went_in(files, tmp_path):
    """With dates, long numbers and keys that not all have, which reading and writing would change; and twice."""
    lines = [
        json.dumps({**row, "date": "2024-05-01 10:00:00", "x": 0.12345678901234566, **({"only": 1} if i == 3 else {})})
        for i, row in enumerate(texts(12, seed=1))
    ]
    (tmp_path / "noisy.jsonl").write_text("\n".join(lines) + "\n")
    given = {**files, "noisy": tmp_path / "noisy.jsonl"}
    assert call("run", *settings(given, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    kept, removed = ((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "removed"))
    assert sorted(kept + removed) == sorted(lines) and len(removed) == 3
    assert [line for line in lines if line in kept] == kept
    # A second round, on what the first one kept, must not write over it.
    again = call(
        "run", *settings({**files, "noisy": tmp_path / "out" / "kept.jsonl"}, tmp_path / "out"), "--fraction", 0.25
    )
    assert again.exit_code == 2 and "would be overwritten" in again.output
    assert (tmp_path / "out" / "kept.jsonl").read_text().splitlines() == kept


def test_a_run_on_other_rows_leaves_an_earlier_one_alone(files, tmp_path):
    assert call("run", *settings(files, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    Dataset.from_list(texts(12, seed=77)).to_json(tmp_path / "others.jsonl")
    result = call("run", *settings({**files, "noisy": tmp_path / "others.jsonl"}, tmp_path / "out"), "--fraction", 0.25)
    assert result.exit_code == 2 and "other rows" in result.output
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}


def test_a_dry_run_counts_the_steps_that_a_run_makes(files, tmp_path):
    Dataset.from_list(texts(13, seed=1)).to_json(tmp_path / "noisy.jsonl")
    given = {**files, "noisy": tmp_path / "noisy.jsonl"}
    arguments = [
        *settings(given, tmp_path / "out"),
        "--batch-size",
        4,
        "--gradient-accumulation-steps",
        2,
        "--fraction",
        0.25,
    ]
    planned = json.loads(call("run", *arguments, "--dry-run", "--json").stdout)
    assert call("run", *arguments).exit_code == 0
    made = [entry["max_steps"] for entry in Trace.open(tmp_path / "out" / "_forgetfilter").manifest["sessions"]]
    assert [planned["steps"], planned["safety_steps"]] == made


def test_score_leaves_a_tracked_trace_alone_and_makes_none_for_a_model_that_is_not_there(finished, files, tmp_path):
    trace = finished[0] / "_forgetfilter"
    mixed = call("score", "--noisy", files["noisy"], "--before", files["model"], "--output", trace)
    assert mixed.exit_code == 2 and "were tracked" in mixed.output
    missing = call("score", "--noisy", files["noisy"], "--before", tmp_path / "none", "--tokenizer", files["model"],
                   "--max-length", 60, "--output", tmp_path / "scored")  # fmt: skip
    assert missing.exit_code == 2 and "cannot be loaded" in missing.output and not Trace.exists(tmp_path / "scored")


def test_rows_that_are_cut_are_counted(files, tmp_path, caplog):
    long = {**texts(1, seed=3)[0], "completion": " cat" * 100}
    Dataset.from_list([*texts(11, seed=1), long]).to_json(tmp_path / "long.jsonl")
    given = {**files, "noisy": tmp_path / "long.jsonl"}
    assert call("run", *settings(given, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    scored = call("score", "--noisy", given["noisy"], "--before", files["model"], "--output", tmp_path / "scored")
    assert scored.exit_code == 0
    assert caplog.text.count("1 of 12 rows were longer than 64 tokens") == 2
    for folder in (tmp_path / "out" / "_forgetfilter", tmp_path / "scored"):
        assert Trace.open(folder).manifest["truncated"] == 1


def test_rows_of_all_kinds_of_files(files, tmp_path):
    rows = load_rows(files["noisy"])
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "rows")
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_list()))
    assert load_from_disk(tmp_path / "rows").to_list() == rows.to_list() == texts(12, seed=1)
    for name in ("rows.csv", "rows.parquet", "rows", "rows.json"):
        assert load_rows(tmp_path / name).to_list() == rows.to_list(), name


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.jsonl", None, "There is no file"),
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", '{"prompt": "a"\n', "cannot be read"),
        ("headed.csv", "prompt,completion\n", "no data"),
        ("broken.parquet", "PAR1", "cannot be read"),
    ],
)
def test_rows_that_cannot_be_read(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load_rows(tmp_path / name)


def test_every_public_name_is_there():
    for name in forgetfilter_callback.__all__:
        assert getattr(forgetfilter_callback, name) is not None, name


def test_a_run_beside_another_changes_nothing(finished, files):
    output, _ = finished
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file() and file.name != ".lock"}
    lock = output / "_forgetfilter" / ".lock"
    hold = "import filelock, sys; l = filelock.FileLock(sys.argv[1]); l.acquire(); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    result = call("run", *settings(files, output), "--seed", 99)
    other.kill()
    other.wait()
    assert result.exit_code == 2 and "Another process is recording" in result.output
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_file_that_changes_during_a_run_does_not_mix_rows_up(files, tmp_path, monkeypatch):
    noisy = tmp_path / "noisy.jsonl"
    noisy.write_text(files["noisy"].read_text())
    given = [json.loads(line) for line in noisy.read_text().splitlines()]
    decided = forgetfilter_callback.run.find_forgotten

    def decide_after_a_change(*arguments, **more):
        noisy.write_text("\n".join(reversed(noisy.read_text().splitlines())))
        return decided(*arguments, **more)

    monkeypatch.setattr(forgetfilter_callback.run, "find_forgotten", decide_after_a_change)
    result = call("run", *settings({**files, "noisy": noisy}, tmp_path / "out"), "--fraction", 0.25, "--json")
    assert result.exit_code == 0, result.output
    values = Trace.open(tmp_path / "out" / "_forgetfilter").forgetting()
    most = np.argsort(-values)[:3].tolist()
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert removed == [row for index, row in enumerate(given) if index in most]


@pytest.mark.parametrize("part", ["removed.jsonl", "card.md", "values.parquet", "decision.json"])
def test_a_filter_that_cannot_write_all_writes_nothing(part, finished, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert call("filter", finished[0], "--fraction", 0.2, "--output", output).exit_code == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    real = Path.open

    def full(file: Path, mode: str = "r", *arguments, **more):
        if part in file.name and mode == "rb+":  # to flush it
            raise OSError(28, "No space left on device")
        return real(file, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    result = call("filter", finished[0], "--fraction", 0.6, "--output", output)
    assert result.exit_code == 1 and "No space left" in result.output
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}


def test_the_safety_set_is_not_written_over_either(files, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "kept.jsonl").write_text(files["safety"].read_text())
    result = call("run", *settings({**files, "safety": output / "kept.jsonl"}, output))
    assert result.exit_code == 2 and "would be overwritten" in result.output
    assert (output / "kept.jsonl").read_text() == files["safety"].read_text()


def test_the_version():
    assert call("--version").output == f"forgetfilter-callback {version('forgetfilter-callback')}\n"


def test_help_does_not_import_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from forgetfilter_callback.cli import app; "
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
