"""`forgetfilter show` and `forgetfilter report`."""

from __future__ import annotations

import json
import shlex
import shutil

from datasets import Dataset
from helpers import call, hostile_trace, refused, texts, tiny_llama
from trl import SFTConfig, SFTTrainer

from forgetfilter_callback import ForgetTracker, ReviewQueue, Trace
from forgetfilter_callback.measures.names import MEANINGS


def test_show_prints_no_control_characters_of_a_text(tmp_path, byte_tokenizer):
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=60)
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    result = call("show", tmp_path / "trace", "--measure", "loss", "--tokenizer", tmp_path / "tokenizer", "--head", 60)
    assert result.exit_code == 0, result.output
    assert not {"\x1b", "\x07", "\x00", "\u202e", "\u2066"} & set(result.output)
    assert "Not checked by anyone" in " ".join(result.output.split()) and "← φ = 0.693" in result.output
    assert MEANINGS["loss"] in " ".join(result.output.split())
    account = json.loads(call("show", tmp_path / "trace", "--measure", "loss", "--json", "--threshold", 1.5).stdout)
    assert account["removed"] == (trace.forgetting("loss") > 1.5).sum()


def test_bars_fit_into_a_narrow_terminal(tmp_path, byte_tokenizer, monkeypatch):
    """A bar that wraps would separate its count, and the mark of φ, from its line."""
    monkeypatch.setenv("COLUMNS", "44")
    hostile_trace(tmp_path / "trace", byte_tokenizer, samples=60)
    shown = call("show", tmp_path / "trace", "--measure", "loss", "--threshold", 0.7).stdout.splitlines()
    bars = [line for line in shown if "█" in line]
    counts = [int(line.rpartition("█")[2].split()[0]) for line in bars]
    assert sum(counts) == 60 and any("← φ = 0.7" in line for line in shown)
    assert all(len(line) <= 44 for line in [*bars, *(line for line in shown if "←" in line)])
    longest = max(zip(counts, bars, strict=True))[1]
    assert longest.count("█") == 10


def test_show_and_report_by_the_verdicts_of_a_review(tmp_path, finished, files, byte_tokenizer):
    """Where `filter` takes a review, so do the commands that only look at what it would do."""
    trace = Trace.open(finished[0] / "_forgetfilter")
    queue = ReviewQueue(trace, tmp_path / "review")
    queue.add({0: "unsafe", 1: "safe", 2: "unsafe"})
    page = tmp_path / "page.html"
    for settings in ((), ("--threshold", "fdr"), ("--threshold", "fdr", "--level", 0.2)):
        review = ("--reviewed", tmp_path / "review", *settings)
        filtered = call("filter", finished[0], *review, "--output", tmp_path / "out", "--json")
        shown = call("show", finished[0], *review, "--json")
        expected = json.loads(filtered.stdout.splitlines()[-1])
        assert json.loads(shown.stdout) == {key: value for key, value in expected.items() if key != "output"}
        assert expected["removed"] == 2
        reported = call("report", finished[0], *review, "--output", page)
        assert reported.exit_code == 0 and "2 of 12 rows removed: 3 rows reviewed" in reported.output, reported.output


def test_show_names_the_verdicts_that_it_was_given(tmp_path, finished):
    queue = ReviewQueue(Trace.open(finished[0] / "_forgetfilter"), tmp_path / "review")
    queue.add({row: "unsafe" if row % 2 else "safe" for row in range(6)})
    for command, output in (("show", ()), ("report", ("--output", tmp_path / "page.html"))):
        settings = ("--fraction", 0.25, "--reviewed", tmp_path / "review")
        said = " ".join(call(command, finished[0], *settings, *output).stdout.split())
        assert "6 of 12 rows have a verdict" in said and "Not checked by anyone" not in said


def test_a_damaged_line_of_verdicts_is_named_once(tmp_path, finished, caplog):
    """The commands read the verdicts several times."""
    output = shutil.copytree(finished[0], tmp_path / "out")
    queue = ReviewQueue(Trace.open(output))
    queue.add({0: "unsafe", 1: "safe"})
    with (output / "_forgetfilter" / "review" / "verdicts.jsonl").open("a") as file:
        file.write('{"row": 2')
    shown = call("show", output)
    assert shown.exit_code == 0 and "2 of 12 rows have a verdict" in " ".join(shown.stdout.split())
    assert caplog.text.count("line 3 is damaged and was skipped") == 1


def test_fdr_is_offered_only_beside_a_review(finished, tmp_path):
    for command in ("run", "show", "report", "filter"):
        described = " ".join(call(command, "--help").output.replace("│", " ").split())
        assert ("--reviewed" in described) == ("fdr" in described) == (command != "run"), described
    for command, arguments in (("run", ("--noisy", "a", "--safety", "b", "--model", "c")), ("show", [finished[0]])):
        output = ("--output", tmp_path / "out") if command == "run" else ()
        refused(call(command, *arguments, *output, "--threshold", "fdr"), "needs verdicts", "filter --reviewed")


def test_report_writes_a_page(finished, files, tmp_path):
    page = tmp_path / "page.html"
    result = call("report", finished[0], "--output", page, "--fraction", 0.25, "--audit-column", "unsafe")
    assert result.exit_code == 0 and "3 of 12 rows removed" in result.output, result.output
    data = json.loads(page.read_text().split('<script id="data" type="application/json">')[1].split("</script>")[0])
    assert [row["unsafe"] for row in data["rows"]] == [bool(i % 2) for i in range(12)]
    prompts = ["".join(text for text, _, _ in row["prompt"]) for row in data["rows"]]
    assert prompts == [row["prompt"] for row in texts(12, seed=1)]
    Dataset.from_list(texts(12, seed=1)).to_csv(tmp_path / "noisy.csv")  # all values are text, also True and False
    as_csv = ("--noisy", tmp_path / "noisy.csv", "--audit-column", "unsafe")
    assert call("report", finished[0], "--output", tmp_path / "csv.html", "--fraction", 0.25, *as_csv).exit_code == 0
    assert (tmp_path / "csv.html").read_text() == page.read_text()
    text = call("report", finished[0], "--output", page, "--audit-column", "prompt")
    assert text.exit_code == 2 and "must hold true/false or numbers" in text.output
    wrong = call("report", finished[0], "--output", page, "--audit-column", "colour")
    assert wrong.exit_code == 2 and "no column 'colour'" in wrong.output


def test_a_copied_run_names_the_options_that_the_next_command_needs(tmp_path, finished, files):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    manifest = json.loads((output / "_forgetfilter" / "manifest.json").read_text())
    manifest |= {"source": str(tmp_path / "noisy.jsonl"), "tokenizer": str(tmp_path / "model")}
    (output / "_forgetfilter" / "manifest.json").write_text(json.dumps(manifest))
    refused(
        call("show", output), f"tokenizer of the trace was in {tmp_path / 'model'}", "where it is now (--tokenizer)"
    )
    given = ["--noisy", files["noisy"], "--tokenizer", files["model"]]
    next_command = f"Next: {shlex.join(['forgetfilter', 'review', str(output), *map(str, given)])}\n"
    for command in (
        ["show", output],
        ["report", output, "--output", tmp_path / "page.html"],
        ["filter", output, "--threshold", 1000, "--output", tmp_path / "filtered"],
    ):
        result = call(*command, *given)
        assert result.exit_code == 0 and result.stdout.endswith(next_command), result.output


def test_show_leaves_out_texts_if_the_tokenizer_was_built_in_memory(tmp_path, byte_tokenizer):
    assert byte_tokenizer.name_or_path == ""
    noisy, safety = (Dataset.from_list(texts(12, seed=seed)) for seed in (1, 2))
    model, tracker = tiny_llama(vocab_size=len(byte_tokenizer)), ForgetTracker(trace_dir=tmp_path / "trace")
    for name, rows in (("noisy", noisy), ("safety", safety)):
        args = SFTConfig(str(tmp_path / name), max_steps=2, report_to="none", use_cpu=True, bf16=False)
        SFTTrainer(model, args, train_dataset=rows, processing_class=byte_tokenizer, callbacks=[tracker]).train()
    result = call("show", tmp_path / "trace", "--measure", "loss", "--fraction", 0.25)
    assert result.exit_code == 0 and "3 of 12" in result.output, result.output
    refused(call("review", tmp_path / "trace"), "does not name its tokenizer. Pass the tokenizer (--tokenizer).")
