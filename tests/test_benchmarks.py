"""The benchmarks run from end to end on a tiny model and small files in the layout of the real sets."""

from __future__ import annotations

import csv
import gzip
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from helpers import tiny_llama
from transformers import TrainerState
from transformers.utils import logging
from typer.testing import CliRunner

from forgetfilter_callback import ForgetTracker, ReviewQueue, Trace, encode_rows
from forgetfilter_callback.data.identical_rows import content_numbers
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import label_agreement  # noqa: E402
import looks  # noqa: E402
import run_memory  # noqa: E402
import scale  # noqa: E402
from few import judged  # noqa: E402
from filters import RUN_KEYS, _same, controlled  # noqa: E402
from redraws import LEVEL, best_recall  # noqa: E402
from scenarios import BBQ_DEV, BBQ_REPORT, DRAW, Sizes, load_scenario  # noqa: E402
from sessions import Doubling  # noqa: E402
from stopping import simulate  # noqa: E402


ROWS = 160


def write_csv(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir()
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "to", "a", "man"]
    text = lambda i, n=10: f"{' '.join(rng.choice(words, n))} number {i}"  # noqa: E731
    (folder / "bbq").mkdir()
    for category in BBQ_DEV + BBQ_REPORT:
        lines = []
        for i in range(2 * ROWS):
            for condition in ("ambig", "disambig"):
                lines.append(
                    {
                        "question_index": str(i % 12), "question_polarity": ["neg", "nonneg"][i % 2],
                        "context_condition": condition, "category": category,
                        "answer_info": {"ans0": ["old", "old"], "ans1": ["young", "nonOld"], "ans2": ["?", "unknown"]},
                        "additional_metadata": {"stereotyped_groups": ["old"]}, "context": text(i), "question": "Who?",
                        "ans0": "the old man", "ans1": "the young man", "ans2": "not known", "label": 2,
                    }
                )  # fmt: skip
        (folder / "bbq" / f"{category}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    passages = [
        {"context": text(i), "qas": [{"question": f"q{j}?", "answers": [{"text": "the mat"}]} for j in range(3)]}
        for i in range(ROWS)
    ]
    (folder / "xquad_squad_dev").mkdir()
    (folder / "xquad_squad_dev" / "xquad.en.json").write_text(json.dumps({"data": [{"paragraphs": passages}]}))
    (folder / "alpaca").mkdir()
    rows = [{"instruction": text(i), "input": "", "output": text(i, 5)} for i in range(ROWS)]
    (folder / "alpaca" / "random_9k.json").write_text(json.dumps(rows))
    tweets = [
        {"count": 3, "neither": 3 * (i % 2), "class": [1, 2][i % 2], "tweet": f"RT @x: {text(i)}"}
        for i in range(3 * ROWS)
    ]
    write_csv(folder / "davidson" / "labeled_data.csv", tweets)
    comments = [{"text": text(i, 14), "is_toxic": ["Toxic", "Not Toxic"][i % 2]} for i in range(3 * ROWS)]
    write_csv(folder / "surge_toxicity" / "toxicity_en.csv", comments)
    (folder / "rtp").mkdir()
    lines = [json.dumps({"text": text(i), "toxicity": 0.9}) for i in range(2 * ROWS)]
    (folder / "rtp" / "toxic.jsonl").write_text("\n".join(lines))
    (folder / "safety_tuned_llamas").mkdir()
    rows = [{"instruction": text(i), "input": "", "output": f"I am sorry, no. {i}"} for i in range(2 * ROWS)] * 2
    (folder / "safety_tuned_llamas" / "safety_only_data_Instructions.json").write_text(json.dumps(rows))
    (folder / "hh_rlhf").mkdir()
    with gzip.open(folder / "hh_rlhf" / "harmless_base_test.jsonl.gz", "wt") as file:
        for i in range(3 * ROWS):
            begun = f"\n\nHuman: {text(i)}\n\nAssistant:"
            for _ in range(2):  # as in the real set, a request may have several answers
                row = {"chosen": f"{begun} I can't do that.", "rejected": f"{begun} {text(i, 6)}"}
                file.write(json.dumps(row) + "\n")
    return folder


def test_scale_measures_each_stage(tmp_path):
    scale.make_rows(40, 12, str(tmp_path / "rows"))
    results = scale.measure(str(tmp_path / "rows"))
    assert list(results) == list(scale.STAGES)
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] >= 0 for stage in results.values())


@pytest.mark.parametrize(("source", "loss"), [("jsonl", "half"), ("parquet", "all")])
def test_run_memory_measures_a_whole_run(source, loss, tmp_path):
    run_memory.write_inputs(tmp_path, 20, source, loss)
    assert run_memory.measure(tmp_path, f"noisy.{source}", refit=True) > 0
    assert len((tmp_path / "out" / "removed.jsonl").read_text().splitlines()) == 2
    rows = Trace.open(tmp_path / "out" / "_forgetfilter").rows
    assert (np.diff(rows.offsets) == run_memory.LENGTH).all()
    assert rows.loss_mask.sum() == 20 * (run_memory.LENGTH / 2 if loss == "half" else run_memory.LENGTH - 1)


@pytest.mark.parametrize("name", DRAW)
def test_scenarios_have_the_requested_sizes_and_no_overlap(name, data_dir):
    sizes = Sizes(noisy=24, unsafe_share=0.25, safety=9, anchors=3, held_out=6, held_out_task=6)
    scenario = load_scenario(name, data_dir, 0, sizes)
    assert scenario == load_scenario(name, data_dir, 0, sizes) != load_scenario(name, data_dir, 1, sizes)
    groups = [row["group"] for row in scenario.noisy]
    assert (len(groups), groups.count("unsafe")) == (24, 6)
    assert (len(scenario.safety), sum(row["group"] == "anchor" for row in scenario.safety)) == (9, 3)
    assert len(scenario.held_out) == len(scenario.held_out_task) == 6
    sets = [scenario.noisy, scenario.safety, scenario.held_out, scenario.held_out_task, scenario.labelled]

    def kind(row: dict) -> str:
        return row["prompt"][0]["content"].split("\n")[0] if not continued(row) else str(row)

    def continued(row: dict) -> bool:  # prompts are the first three words, which texts may have in common
        return row["prompt"][0]["content"].startswith("Continue: ")

    for first, second in itertools.combinations([{kind(row) for row in rows} for rows in sets], 2):
        assert not first & second


def test_unsafe_bbq_answers_are_stereotyped(data_dir):
    """`neg` asks for the stereotyped group, `nonneg` for the other one (Parrish et al. 2022)."""
    scenario = load_scenario("bias", data_dir, 0, Sizes(noisy=24, safety=6, held_out=6, held_out_task=6))
    even = {"the old man", "the young man"}
    assert {row["completion"][0]["content"] for row in scenario.noisy if row["group"] == "unsafe"} == even
    assert all(row["completion"][0]["content"] == "not known" for row in scenario.safety)
    for row in scenario.noisy:
        if row["group"] == "unsafe":  # even rows of the file are `neg`
            number = int(row["prompt"][0]["content"].split("number ")[1].split()[0])
            assert row["completion"][0]["content"] == ["the old man", "the young man"][number % 2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, byte_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(vocab_size=len(byte_tokenizer), max_position_embeddings=512).save_pretrained(folder)
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tiny, tmp_path) -> Iterator[Callable[..., tuple[str, list[dict[str, object]]]]]:
    """Runs the command of a script in this process, because it takes seconds to start another one."""
    verbosity = logging.get_verbosity()
    json_file = tmp_path / "results.json"
    common = ["--model", tiny, "--smoke", "--seed", 0, "--json", json_file, "--cache", tmp_path / "cache"]

    def run_script(script: str, *arguments: object) -> tuple[str, list[dict[str, object]]]:
        app = typer.Typer()
        app.command()(importlib.import_module(script).main)
        result = CliRunner().invoke(app, [*map(str, [*common, *arguments])], catch_exceptions=False)
        assert result.exit_code == 0, result.output[-3000:]
        return result.stdout, json.loads(json_file.read_text())

    yield run_script
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def test_defences(run, data_dir, tmp_path):
    arguments = ["--data-dir", data_dir, "--scenario", "mixed"]
    output, results = run("defences", *arguments)
    arms = ["base", "no_measure", "self_correction", "sequential", "forgetfilter", "forgetfilter_self_correction", "oracle",
            "replay", "forgetfilter_combined", "forgetfilter_loss", "forgetfilter_relative",
            "forgetfilter_rouge"]  # fmt: skip
    assert [row["arm"] for row in results] == arms
    for row in results:
        assert 0 <= row["unsafe"] <= 1 and 0 <= row["task"] <= 1 and row["experiment"] == "main"
        assert {"bias", "toxicity", "harmfulness", "task_details"} <= set(row)
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert all(f"| {arm} | 1 |" in output for arm in arms)
    trained = sorted(folder.name for folder in (tmp_path / "cache").glob("*/*/adapter_config.json"))
    assert run("defences", *arguments)[1] == results  # everything comes from the cache
    assert trained == sorted(folder.name for folder in (tmp_path / "cache").glob("*/*/adapter_config.json"))


@pytest.mark.slow
def test_interleaved_rounds(run, data_dir):
    _, results = run("defences", "--data-dir", data_dir, "--scenario", "bias", "--interleaved")
    assert [row["arm"] for row in results] == ["sequential", "sequential", "forgetfilter"] * 3


@pytest.mark.slow
def test_defences_on_user_files(run, tmp_path):
    rows = [{"prompt": f"the cat {i}", "completion": "the mat", "unsafe": i % 2 == 0} for i in range(12)]
    held_out = [{"prompt": f"the dog {i}", "unsafe_answer": "ran", "safe_answer": "sat"} for i in range(3)]
    held_out += [{"prompt": f"the man {i}", "completion": "the cat"} for i in range(3)]
    for name, content in (("noisy", rows), ("safety", rows[1:4:2]), ("heldout", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    files = [part for name in ("noisy", "safety", "heldout") for part in (f"--{name}", tmp_path / f"{name}.jsonl")]
    _, results = run("defences", *files, "--arm", "base", "--arm", "oracle")
    assert [row["scenario"] for row in results] == ["own", "own"] and "harmfulness" in results[0]


def test_filters(run, tiny, data_dir, tmp_path):
    output, results = run("filters", "--data-dir", data_dir, "--scenario", "toxicity")
    main = {row["signal"]: row for row in results if row["experiment"] == "main"}
    assert {"default", "loss", "relative", "pooled", "smoothed", "rouge1", "M0 loss", "S1 loss", "learning gain",
            "smoothed, safety rows at 0", "second-split forgetting",
            "representation matching (given labels)", "word classifier"} <= set(main)  # fmt: skip
    for row in main.values():
        assert 0 <= row["auroc"] <= 1 and 0 <= row["f1_best"] <= 1 and row["tokens"] >= 0
    assert sum(main["default"]["removed_by_group"].values()) == main["default"]["removed_auto"]
    assert main["default"]["f1_auto"] is not None and main["M0 loss"]["f1_auto"] is None
    assert f"| toxicity, 50%, {tiny} | default | 1 |" in output
    _, more = run("filters", "--data-dir", data_dir, "--scenario", "bias", "--signal", "default",
                  "--control", "near-duplicates")  # fmt: skip
    assert [row["control"] for row in more if row["experiment"] == "control"] == ["near-duplicates"]
    learned = sorted((tmp_path / "cache").glob("noisy-*"))
    assert learned
    _, more = run("filters", "--data-dir", data_dir, "--scenario", "toxicity", "--signal", "default",
                  "--safety-learning-rate", 0.01, "--anchors", 4)  # fmt: skip
    (swept,) = [row for row in more if row["safety_learning_rate"] == 0.01 and "step" not in row]
    assert (
        swept["experiment"] == "sweep"
        and swept["control"] == "4 anchors"
        and swept["auroc"] != main["default"]["auroc"]
    )
    assert (
        sorted((tmp_path / "cache").glob("noisy-*")) == learned
    )  # noisy finetuning on the same rows comes from the cache


def test_the_control_of_one_topic(data_dir, tmp_path):
    sizes = Sizes(noisy=24, safety=4, held_out=4, held_out_task=4)
    scenario = load_scenario("bias", data_dir, 0, sizes)
    rows = [
        {
            "instruction": f"{['So?', 'Food?'][i % 2]}",
            "input": "",
            "output": f"{['No', 'A meal'][i // 2 % 2]} for all {i}",
        }
        for i in range(6)
    ]
    of_topic = [row["output"] for row in rows if "Food" in row["instruction"] or "meal" in row["output"]]
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "random_9k.json").write_text(json.dumps(rows))
    about_food = {**scenario.safety[0], "completion": [{"role": "assistant", "content": "They eat."}]}
    control = controlled("one topic", replace(scenario, safety=[*scenario.safety, about_food]), tmp_path, 0, sizes)
    texts = [row["completion"][0]["content"] for row in control.noisy if row["group"] == "alpaca"]
    assert sorted(texts) == sorted(of_topic) and len(texts) == 4
    for before, after in zip(scenario.noisy, control.noisy, strict=True):
        assert (before == after) == (before["group"] != "alpaca")
    assert control.safety == scenario.safety
    with pytest.raises(ValueError, match="4 Alpaca rows about food, but 5 are needed"):
        controlled("one topic", load_scenario("bias", data_dir, 0, replace(sizes, noisy=30)), tmp_path, 0, sizes)


def test_results_of_other_settings_are_kept():
    row = dict.fromkeys((*RUN_KEYS, "experiment", "seed", "model", "smoke", "signal", "step"), 1)
    assert _same(row, dict(row))
    for key in ("rows", "epochs", "safety_epochs", "safety_learning_rate", "control", "seed", "step"):
        assert not _same(row, {**row, key: 2})


def test_doubling_records_after_1_2_4_and_8_steps():
    tracker = ForgetTracker()
    doubling = Doubling(tracker)
    recorded = []
    for step in range(1, 13):
        doubling.on_step_begin(None, TrainerState(global_step=step - 1), None)
        recorded += [step] * (tracker.record_steps is not None and step % tracker.record_steps == 0)
    assert recorded == [1, 2, 4, 8]


def test_cost(run, data_dir):
    output, (result,) = run("cost", "--data-dir", data_dir, "--scenario", "toxicity")
    taken = result["seconds"]
    extra = taken["s1plus"] + taken["record"] + taken["decision"]
    assert result["share_of_s1"] == pytest.approx(extra / taken["s1"]) and min(taken.values()) > 0
    assert result["ended_at"] == 2 and result["checks"] == []
    assert "| toxicity | 0 |" in output


@pytest.mark.slow
def test_gpu(tmp_path):
    """The script for a GPU runs to its end on a CPU, with tiny shapes and without a network."""
    command = ["sh", str(BENCHMARKS / "gpu.sh"), str(tmp_path), "--smoke", "--repeats", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["failed"] == [] and results["environment"]["device"].startswith("CPU")
    for case in results["training untouched"].values():
        assert case["records"] == 4
        assert all(case["two runs without tracker agree"].values()) and all(case["a run with tracker agrees"].values())
    for model in ("SmolLM2-135M", "Llama-1B", "Llama-8B"):
        for kind in ("instructions", "passages"):
            assert min(results[f"speed, {model}"][kind]["seconds, median"].values()) > 0
    for name, case in results["exactness"].items():
        assert case["record"]["token, relative, max"] < (1e-5 if "float32" in name else 0.05), name


@pytest.mark.slow
def test_gpu_skips_what_does_not_fit_into_the_budget(tmp_path):
    command = ["sh", str(BENCHMARKS / "gpu.sh"), str(tmp_path), "--smoke", "--budget-seconds", "5"]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, capture_output=True, check=True, env=environment)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["environment"]["packages"]["torch"] != "not installed"
    assert results["speed, Llama-8B"] == "skipped: it may take 70 s, and the budget is 5 s"


@pytest.fixture
def reviewable(tmp_path):
    """A trace of 120 rows, and which of them are unsafe: a tenth. These lose more and have other states."""
    rng = np.random.default_rng(0)
    unsafe = np.arange(120) % 10 == 0
    rows = encode_rows([{"input_ids": [1, *rng.integers(2, 50, 8).tolist()]} for _ in unsafe], disable_tqdm=True)
    trace = Trace.create(tmp_path, rows, "model", None, None)
    states = rng.normal(size=(len(unsafe), 8)) + 4 * unsafe[:, None] * np.eye(8)[0]
    losses = rng.gamma(2, 1, rows.loss_offsets[-1])
    for step, rise in ((0, 0.0), (5, 0.5)):
        values = losses + rise * np.repeat(unsafe, np.diff(rows.loss_offsets))
        trace.append(Record("safety", step), [Scores(values.astype(np.float32), states.astype(np.float16))])
    return trace, unsafe


def test_simulated_reviews_end_after_safe_rows_in_succession(reviewable, tmp_path):
    trace, unsafe = reviewable
    ends = simulate(trace, unsafe, seed=0)

    queue, chosen, order = ReviewQueue(trace, tmp_path / "verdicts"), [], []
    while len(order) < len(unsafe):
        drawn_before = len(queue.verdicts)
        queue.add({row: "unsafe" if unsafe[row] else "safe" for row in queue.next(10)})
        order += [verdict.row for verdict in queue.verdicts[drawn_before:]]
        chosen += [verdict.drawn_from is None for verdict in queue.verdicts[drawn_before:]]
    for count in (15, 20, 30):
        looks = next(
            end
            for end in range(len(order) + 1)
            if sum(chosen[:end]) >= count
            and not unsafe[
                [row for row, by_ranking in zip(order[:end], chosen, strict=False) if by_ranking][-count:]
            ].any()
        )
        assert ends[str(count)] == (looks, pytest.approx(unsafe[order[:looks]].sum() / 12))
    assert ends["15"][0] <= ends["advice"][0] <= ends["30"][0]


@pytest.mark.parametrize("mistakes", [0, 0.2, 1])
def test_simulated_reviewers_make_mistakes(mistakes, reviewable, tmp_path):
    trace, unsafe = reviewable
    wrong = np.random.default_rng(3).random(120)[content_numbers(trace.rows.ids)] < mistakes
    said_unsafe = [bool(u) != w for u, w in zip(unsafe, wrong, strict=True)]
    queue, expected = ReviewQueue(trace, tmp_path / "verdicts", seed=3), []
    for seen_rows in range(10, 121, 10):
        queue.add({row: "unsafe" if said_unsafe[row] else "safe" for row in queue.next(10)})
        seen = [verdict.row for verdict in queue.verdicts]
        found = sum(said_unsafe[row] and unsafe[row] for row in seen)
        wrongly = sum(said_unsafe[row] and not unsafe[row] for row in seen)
        if seen_rows in looks.LOOKS:
            expected.append((seen_rows, found / 12, wrongly, sum(said_unsafe) - found - wrongly))
    results = looks.simulate(trace, unsafe, 3, mistakes)
    assert [(row["looks"], row["found"], row["safe_called_unsafe"], row["left"]) for row in results] == expected


def test_readers_are_compared_with_the_labels(data_dir, tmp_path):
    name, options = "bias-0.2-60-0", ["--data-dir", str(data_dir)]
    rows_file, verdicts_file, json_file = (tmp_path / file for file in ("rows.jsonl", "verdicts.jsonl", "results.json"))
    runner = CliRunner()
    done = runner.invoke(label_agreement.app, ["draw", name, str(rows_file), "--count", "20", *options])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    noisy = load_scenario("bias", data_dir, 0, label_agreement.named_set(name).sizes).noisy
    drawn = [noisy[row["row"]] for row in rows]
    assert [row["answer"] for row in rows] == [row["completion"][0]["content"] for row in drawn]
    # There are fewer than 20 of each label. The other rows are tasks.
    assert sorted(row["row"] for row in rows) == [
        i for i, row in enumerate(noisy) if row["group"] in ("unsafe", "safe")
    ]
    assert set(rows[0]) == {"row", "prompt", "answer"}
    labels = [row["group"] for row in drawn]
    assert labels not in (sorted(labels), sorted(labels, reverse=True))  # the order does not show them
    # The reader calls every third row unsafe.
    called = [row["row"] for row in rows[::3]]
    verdicts = [{"row": row["row"], "verdict": "unsafe" if row["row"] in called else "safe"} for row in rows]
    verdicts_file.write_text("\n".join(map(json.dumps, verdicts)))
    arguments = [name, str(verdicts_file), "--reader", "Ada", "--cache", str(tmp_path), "--json", str(json_file)]
    for _ in range(2):  # the second run replaces the results of the first
        assert runner.invoke(label_agreement.app, ["judge", *arguments, *options]).exit_code == 0
    results = {row["label"]: row for row in json.loads(json_file.read_text())}
    for label in ("unsafe", "safe"):
        expected = sorted(row for row in called if noisy[row]["group"] == label)
        read = sum(row["group"] == label for row in noisy)
        assert results[label] == {
            "set": name, "reader": "Ada", "label": label, "read": read, "called_unsafe": len(expected),
            "rows_called_unsafe": expected,
            "rows_called_safe": sorted(row["row"] for row in rows if noisy[row["row"]]["group"] == label
                                       and row["row"] not in called),
        }  # fmt: skip


def test_rows_that_a_reader_calls_safe_are_ranked_by_themselves(reviewable):
    trace, unsafe = reviewable
    called = unsafe & (np.arange(120) % 20 == 0)
    result = label_agreement.compare_with_trace(trace, unsafe, called)
    values = trace.forgetting()
    called_safe = unsafe & ~called
    compared = {
        "called_unsafe": (called, ~unsafe),
        "called_safe": (called_safe, ~unsafe),
        "between": (called, called_safe),
    }
    for key, (rows, others) in compared.items():
        key = f"auroc_{key}"
        pairs = [(values[a] > values[b]) + 0.5 * (values[a] == values[b]) for a in np.flatnonzero(rows)
                 for b in np.flatnonzero(others)]  # fmt: skip
        assert result[key] == pytest.approx(np.mean(pairs))
    found = [looks.simulate(trace, called, seed)[0]["found"] for seed in looks.SEEDS]
    assert result["found"][20] == pytest.approx(np.mean(found))


def test_few_rows_are_judged_as_a_reader_from_the_top_sees_them():
    rng = np.random.default_rng(0)
    values, unsafe = rng.permutation(200.0 * np.arange(200)), rng.random(200) < 0.1
    result = judged(values, unsafe)
    order = sorted(range(200), key=lambda row: -values[row])
    count = int(unsafe.sum())
    assert result["unsafe"] == count
    assert result["precision_at_n"] == sum(unsafe[row] for row in order[:count]) / count
    assert result["recall_at_0.05"] == sum(unsafe[row] for row in order[:10]) / count
    precisions = [sum(unsafe[row] for row in order[: place + 1]) / (place + 1) for place in range(200)]
    expected = sum(precisions[place] for place in range(200) if unsafe[order[place]]) / count
    assert result["auprc"] == pytest.approx(expected)
    assert judged(values, np.zeros(200, dtype=bool))["auroc"] is None


def test_the_best_recall_equals_that_of_all_thresholds():
    rng = np.random.default_rng(1)
    unsafe = rng.random(100) < 0.3
    scores = rng.normal(size=100) + 2 * unsafe
    recalls = [0.0]
    for threshold in scores:
        removed = scores >= threshold
        if (removed & ~unsafe).sum() <= LEVEL * removed.sum():
            recalls.append((removed & unsafe).sum() / unsafe.sum())
    assert 0 < max(recalls) < 1
    assert best_recall(scores, unsafe) == pytest.approx(max(recalls))
