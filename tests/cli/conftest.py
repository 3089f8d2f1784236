"""A finished `forgetfilter run`, shared by the tests of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import call, run_options
from typer.testing import Result


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("run") / "out"
    return output, call("run", *run_options(files, output), "--fraction", 0.25, "--refit", "--json")
