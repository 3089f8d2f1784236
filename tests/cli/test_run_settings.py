"""`forgetfilter run`: settings from the command line and from a YAML file, and runs that are resumed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import call, run_options, tiny_llama
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from forgetfilter_callback import FilterConfig, ForgetFilter, RunConfig, Trace
from forgetfilter_callback.errors import DataError
from forgetfilter_callback.pipeline import cost_estimate as plan_module
from forgetfilter_callback.pipeline.cost_estimate import Plan
from forgetfilter_callback.pipeline.load_model import add_lora, load_model, lora_config
from forgetfilter_callback.pipeline.output_record import is_complete
from forgetfilter_callback.pipeline.run import training_arguments
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.argument_checks import check_fields


REQUIRED = ("--model", "m", "--noisy", "n.jsonl", "--safety", "s.jsonl", "--output", "out")


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """A function that returns the settings of a command line. Nothing runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("n.jsonl", "s.jsonl"):
        Path(name).write_text("{}\n")
    configs: list[RunConfig] = []

    def remember(config: RunConfig) -> Plan:
        configs.append(config)
        return Plan(*[0] * len(dataclasses.fields(Plan)))

    monkeypatch.setattr(plan_module, "plan", remember)

    def parse(*arguments: object) -> RunConfig:
        result = call("run", *arguments, "--dry-run")
        assert result.exit_code == 0, result.output
        return configs[-1]

    return parse


def options(flag: str, *settings: str) -> list[str]:
    return [argument for setting in settings for argument in (flag, setting)]


@pytest.mark.parametrize(
    ("given", "on_accelerator", "expected"),
    [
        ([], False, (1, 4)),
        ([], True, (4, 1)),
        (["per_device_train_batch_size=8"], False, (8, 1)),
        (["gradient_accumulation_steps=2"], False, (4, 2)),
    ],
)
def test_a_cpu_takes_the_four_rows_of_a_step_one_at_a_time(given, on_accelerator, expected, parsed, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: on_accelerator)
    for args in training_arguments(parsed(*REQUIRED, *options("--training", *given))):
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected


def test_any_training_field_reaches_the_arguments_of_both_sessions(parsed):
    fields = options(
        "--training", "warmup_steps=2", "gradient_checkpointing=true", "bf16=true", "use_cpu=true", "save_strategy=epoch",
        "lr-scheduler-type=cosine", 'lr_scheduler_kwargs={"num_cycles": 0.25}', "max_grad_norm=0.5", "num_train_epochs=7",
    )  # fmt: skip
    config = parsed(*REQUIRED, *fields, "--safety-training", "max_grad_norm=0.1")
    noisy, safety = training_arguments(config)
    for args in (noisy, safety):
        assert args.warmup_steps == 2 and args.save_strategy == "epoch" and args.lr_scheduler_type == "cosine"
        assert args.gradient_checkpointing is True and args.bf16 is True and args.use_cpu is True
        assert args.lr_scheduler_kwargs == {"num_cycles": 0.25}
        assert args.learning_rate == 2e-4  # the default
    assert (noisy.max_grad_norm, safety.max_grad_norm) == (0.5, 0.1)
    assert (noisy.num_train_epochs, safety.num_train_epochs) == (7, 2)  # each session has its own length
    noisy, safety = training_arguments(parsed(*REQUIRED, "--training", "max_steps=9"))
    assert (noisy.max_steps, safety.max_steps) == (9, -1)


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ((), (5e-5, 2e-5)),
        (("--training", "learning_rate=1e-5"), (1e-5, 1e-5)),
        (("--safety-training", "learning_rate=1e-5"), (5e-5, 1e-5)),
    ],
)
def test_all_weights_are_trained_with_lower_learning_rates(parsed, given, rates):
    noisy, safety = training_arguments(parsed(*REQUIRED, "--no-use-lora", *given))
    assert (noisy.learning_rate, safety.learning_rate) == rates


def test_numbers_in_exponent_notation_are_numbers_in_a_file_too(parsed, tmp_path):
    (tmp_path / "config.yaml").write_text("training:\n  learning_rate: 1e-3\nsafety_training: {learning_rate: 2e-5}\n")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["learning_rate"] == "1e-3"
    noisy, safety = training_arguments(parsed(*REQUIRED, "--config", tmp_path / "config.yaml"))
    assert type(noisy.learning_rate) is type(safety.learning_rate) is float
    assert (noisy.learning_rate, safety.learning_rate) == (1e-3, 2e-5)


def test_any_lora_field_reaches_the_adapter(parsed, files):
    fields = options("--lora", "r=2", 'target_modules=["q_proj"]', "lora_alpha=5", "use_rslora=true")
    adapter = load_model(parsed(*run_options(files, Path("out")), *fields), seed=0)
    lora = adapter.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.use_rslora, lora.lora_dropout) == (2, 5, True, 0.05)
    trained = {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2  # two layers, A and B
    assert all(".q_proj.lora_" in name and 2 in parameter.shape for name, parameter in trained.items())
    full = load_model(parsed(*REQUIRED, "--model", files["model"], "--no-use-lora"), seed=0)
    assert all(parameter.requires_grad and "lora" not in name for name, parameter in full.named_parameters())


def test_options_override_a_file_and_merge_with_its_sections(parsed, tmp_path):
    content = {
        "model": "m", "noisy": "n.jsonl", "safety": "s.jsonl", "output": "out", "refit": True, "max_length": 9,
        "training": {"learning_rate": 1e-2, "num_train_epochs": 1}, "safety_training": {"seed": 4},
        "lora": {"r": 4, "lora_alpha": 8}, "filter": {"measure": "loss", "fraction": 0.5},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    config = parsed("--config", tmp_path / "config.yaml")
    assert config == RunConfig(**{**content, "filter": FilterConfig("loss", fraction=0.5)})
    changes = [
        "--output",
        "other",
        "--no-refit",
        "--training",
        "learning_rate=3e-2",
        "--lora",
        "r=2",
        "--fraction",
        0.25,
    ]
    config = parsed("--config", tmp_path / "config.yaml", *changes)
    assert (config.output, config.refit, config.max_length, config.model) == ("other", False, 9, "m")
    assert config.training == {"learning_rate": 3e-2, "num_train_epochs": 1} and config.safety_training == {"seed": 4}
    assert config.lora == {"r": 2, "lora_alpha": 8} and config.filter == FilterConfig("loss", fraction=0.25)


@pytest.mark.parametrize("flags", [
    ["--fraction", 0.25, "--measure", "loss", *options("--lora", 'target_modules=["q_proj"]', "r=2")],
    ["--threshold", -0.5, "--no-use-lora", "--refit", "--record-steps", 0.5, "--stop-early", "--dtype", "bfloat16"],
    [*options("--training", "seed=3", "learning_rate=1e-30", "report_to=none"), "--safety-training", "max_steps=3"],
])  # fmt: skip
def test_the_saved_settings_are_read_again(flags, parsed, tmp_path):
    config = parsed(*REQUIRED, *flags)
    config.save(tmp_path / "config.yaml")
    assert parsed("--config", tmp_path / "config.yaml") == config


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """The output of a run without interruption that saves checkpoints."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert call("run", *saving_options(files, output)).exit_code == 0
    return output


def saving_options(files: dict[str, Path], output: Path) -> list[object]:
    # One batch per step, so that the tests can count steps.
    saving = options("--training", "save_strategy=steps", "save_steps=2", "per_device_train_batch_size=4")
    return [*run_options(files, output), *saving, "--fraction", 0.25]


def test_gradient_checkpointing_with_lora_changes_no_result(whole, files, tmp_path, monkeypatch):
    calls, forward = 0, LlamaMLP.forward

    def counted_forward(layer, *arguments):
        nonlocal calls
        calls += layer.training
        return forward(layer, *arguments)

    monkeypatch.setattr(LlamaMLP, "forward", counted_forward)
    flags = [*saving_options(files, tmp_path / "out"), "--training", "gradient_checkpointing=true"]
    assert call("run", *flags).exit_code == 0
    assert calls == 2 * 2 * (12 + 4)  # two layers, each computed again by the backward pass, in all steps
    first, second = (Trace.open(folder / "_forgetfilter").losses() for folder in (whole, tmp_path / "out"))
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert second[1].mean() < second[0].mean() - 0.1  # the adapter has learned the noisy set
    assert (whole / "kept.jsonl").read_bytes() == (tmp_path / "out" / "kept.jsonl").read_bytes()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("last_step", [7, 12 + 1, 12 + 3], ids=["noisy", "safety before a checkpoint", "safety"])
def test_an_interrupted_run_is_resumed(last_step, error, whole, files, tmp_path, monkeypatch):
    output, steps = tmp_path / "out", 0
    training_step = Trainer.training_step

    def interrupted_step(*arguments, **more):
        nonlocal steps
        steps += 1
        if steps > last_step:
            raise error("interrupted")
        return training_step(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted_step)
        result = call("run", *saving_options(files, output))
    assert result.exit_code == (130 if error is KeyboardInterrupt else 1) and not (output / "kept.jsonl").exists()
    resumed_steps = 0

    def counted_step(*arguments, **more):
        nonlocal resumed_steps
        resumed_steps += 1
        return training_step(*arguments, **more)

    monkeypatch.setattr(Trainer, "training_step", counted_step)
    result = call("run", "--config", output / "config.yaml", "--resume")
    assert result.exit_code == 0, result.output
    assert resumed_steps == 12 + 4 - last_step // 2 * 2  # from the last checkpoint
    first, second = (Trace.open(folder / "_forgetfilter") for folder in (whole, output))
    expected = [Record("noisy", 0), Record("noisy", 12), Record("safety", 0), Record("safety", 4)]
    assert first.records() == second.records() == expected
    np.testing.assert_array_equal(first.losses(), second.losses())
    for name in ("kept.jsonl", "removed.jsonl"):
        assert (whole / name).read_bytes() == (output / name).read_bytes()
    assert len((output / "removed.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("refit", [(), ("--refit",)])
def test_a_complete_run_is_not_trained_again(refit, files, tmp_path, monkeypatch):
    """A cluster job that is started again must not repeat a run that has no checkpoints."""
    flags = [*run_options(files, tmp_path / "out"), "--fraction", 0.25, *refit]
    first = call("run", *flags)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", None)
        second = call("run", *flags, "--resume")
    assert (
        second.exit_code == 0 and second.stdout.startswith("Removed 3 of 12") and first.stdout.endswith(second.stdout)
    )
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
    result = call("run", *flags, "--training", "learning_rate=0.5", "--resume")
    assert result.exit_code == 2 and "these differ: training" in " ".join(result.output.split())
    lost = tmp_path / "out" / ("model/adapter_model.safetensors" if refit else "removed.jsonl")
    content = lost.read_bytes()
    lost.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ForgetFilter, "safety_finetune", None)
        assert call("run", *flags, "--resume").exit_code == 1  # it trains again
    lost.write_bytes(content)
    assert not is_complete(tmp_path / "out")


def test_a_run_keeps_its_rows_once(files, tmp_path, monkeypatch):
    pipelines, safety_finetune = [], ForgetFilter.safety_finetune

    def remembered(pipeline, *arguments):
        pipelines.append(pipeline)
        return safety_finetune(pipeline, *arguments)

    monkeypatch.setattr(ForgetFilter, "safety_finetune", remembered)
    flags = [*saving_options(files, tmp_path / "out"), "--refit"]
    for more in ([], ["--resume"]):
        assert call("run", *flags, *more).exit_code == 0
        shutil.rmtree(tmp_path / "out" / "filter_result")  # so that the run is not complete
        trained, recorded = pipelines[-1].noisy.rows, pipelines[-1].tracker.trace.rows
        assert recorded.tokens is trained.tokens and recorded.loss_mask is trained.loss_mask
        assert recorded.attention_mask is trained.attention_mask and trained.attention_mask.strides == (0,)


def test_access_tokens_are_not_saved(parsed, tmp_path):
    config = parsed(*REQUIRED, *options("--training", "hub_token=hf_secret", "learning_rate=0.5"))
    config.save(tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert config.training["hub_token"] == "hf_secret" and "secret" not in text and "token" not in text
    assert yaml.safe_load(text)["training"] == {"learning_rate": 0.5}


@pytest.mark.parametrize(("text", "value"), [("False", False), ("false", False), ("True", True), ("true", True)])
def test_python_and_json_spellings_of_booleans(parsed, text, value):
    config = parsed(*REQUIRED, "--lora", f"use_dora={text}", "--training", f"bf16={text}")
    assert config.lora == {"use_dora": value} and config.training == {"bf16": value}


def test_alpha_follows_the_rank(parsed):
    for flags, alpha in ((("r=4",), 8), (("r=4", "lora_alpha=5"), 5), ((), 16)):
        assert lora_config(parsed(*REQUIRED, *options("--lora", *flags)).lora).lora_alpha == alpha


@pytest.mark.parametrize("initialization", ["gaussian", "pissa", "pissa_niter_4", "olora"])
def test_initializations_that_peft_knows_by_name(parsed, initialization):
    settings = parsed(*REQUIRED, "--lora", f"init_lora_weights={initialization}").lora
    assert lora_config(settings).init_lora_weights == initialization
    assert add_lora(tiny_llama(), 0, settings).peft_config["default"].init_lora_weights == initialization


def test_no_is_a_name_for_fields_that_know_it(parsed, tmp_path):
    settings = parsed(*REQUIRED, "--training", "include_num_input_tokens_seen=no").training
    check_fields("training", TrainingArguments, settings)
    assert TrainingArguments(str(tmp_path), **settings).include_num_input_tokens_seen == "no"


def test_yaml_reads_no_as_false_but_a_strategy_as_no(parsed, tmp_path):
    (tmp_path / "config.yaml").write_text("training: {save_strategy: no}\nlora:\n")
    config = parsed(*REQUIRED, "--config", tmp_path / "config.yaml")
    assert config.training == {"save_strategy": "no"} and config.lora == {}


@pytest.mark.parametrize("field", ["output_dir=x", "resume_from_checkpoint=x", "push_to_hub=true"])
@pytest.mark.parametrize("flag", ["--training", "--safety-training"])
def test_fields_that_the_run_sets_are_refused(field, flag):
    result = call("run", *REQUIRED, flag, field)
    assert result.exit_code == 2 and f"must not contain {field.partition('=')[0]}" in result.output


def test_a_resumed_run_must_have_the_same_settings(whole, files, tmp_path):
    output = tmp_path / "out"
    flags = saving_options(files, output)
    assert call("run", *flags, "--fraction", 0.25).exit_code == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    for changes, names in (
        (["--fraction", 0.5], "filter"),
        (["--fraction", 0.25, "--training", "weight_decay=0.5"], "training"),
    ):
        result = call("run", *flags, *changes, "--resume")
        assert result.exit_code == 2 and f"but these differ: {names}." in " ".join(result.output.split())
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("content", [b"", b"- 1", b"text", b"a: [", b"\xff\xfe"])
def test_a_damaged_configuration_cannot_be_resumed(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.yaml is damaged, so the run cannot be resumed"):
        RunConfig("m", "n", "s", "o").check_same_as(tmp_path / "config.yaml")
