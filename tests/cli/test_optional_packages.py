"""Without an optional package, the message names the extra that installs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import hostile_trace


# What is run without which package, and what the message says.
CASES = {
    "typer": ("from forgetfilter_callback.cli.main import main; main()", "cli", "The command line"),
    "rich": (
        "import sys; from forgetfilter_callback.cli.main import main; sys.argv = ['forgetfilter', 'show', TRACE]; main()",
        "cli",
        "`forgetfilter show`",
    ),
    "plotly": (
        "import sys; from forgetfilter_callback.cli.main import main; "
        "sys.argv = ['forgetfilter', 'report', TRACE, '--tokenizer', TRACE + '/tokenizer']; main()",
        "report",
        "The report",
    ),
    "jinja2": (
        "from forgetfilter_callback.reports.review_page import write_review_page; write_review_page(None, 'x', None)",
        "report",
        "The report",
    ),
    "flask": (
        "import sys; from forgetfilter_callback.cli.main import main; sys.argv = ['forgetfilter', 'review', TRACE]; main()",
        "review",
        "`forgetfilter review`",
    ),
    "matplotlib": (
        "from forgetfilter_callback.trace.plot_trace import new_figure; new_figure(8)",
        "report",
        "The plot",
    ),
    "rouge_score": ("from forgetfilter_callback.measures.rouge import rouge1; rouge1(['a'], ['a'])", "rouge", "rouge1"),
}


@pytest.mark.parametrize("package", CASES)
def test_a_missing_package_names_its_extra(package, tmp_path, byte_tokenizer):
    code, extra, feature = CASES[package]
    if "TRACE" in code:
        hostile_trace(tmp_path / "trace", byte_tokenizer, samples=30)
        byte_tokenizer.save_pretrained(tmp_path / "trace" / "tokenizer")
    code = code.replace("TRACE", repr(str(tmp_path / "trace")))
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None; {code}"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    name = package.replace("_", "-")
    assert message.endswith(f'{feature} needs the package {name}: pip install "forgetfilter-callback[{extra}]"'), (
        message
    )
    assert ("Traceback" in result.stderr) == ("main()" not in code)  # the command line prints one line
    assert not (tmp_path / "x").exists()


def test_everything_else_works_without_optional_packages(tmp_path, byte_tokenizer):
    """Recording, measuring and filtering work. FilteredSFTTrainer says that it needs trl."""
    hostile_trace(tmp_path / "trace", byte_tokenizer, samples=30)
    names = ("ForgetTracker", "FilteredTrainer", "ForgetFilter", "RunConfig", "run", "encode_rows", "score_checkpoints")
    optional = [
        "trl",
        *(package for package in CASES if package != "jinja2"),
    ]  # torch needs jinja2, so it is always there
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({optional})); import forgetfilter_callback as package; "
        f"[getattr(package, name) for name in {names}]; "
        f"trace = package.Trace.open({str(tmp_path / 'trace')!r}); "
        "print(package.find_forgotten(trace, package.FilterConfig('loss')).counts['removed'], flush=True); "
        "package.FilteredSFTTrainer"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "10", result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.endswith('FilteredSFTTrainer needs the package trl: pip install "forgetfilter-callback[trl]"'), (
        message
    )
