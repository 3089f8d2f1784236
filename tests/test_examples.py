"""The example notebook runs, and its values are shown as tables and plots."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from forgetfilter_callback import FilterResult, Trace


NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"


def run_cell(code: str, names: dict[str, object]) -> object:
    """Run a cell as Jupyter does: the value of a last line that is an expression is what the cell shows."""
    module = ast.parse(code)
    last = module.body.pop() if isinstance(module.body[-1], ast.Expr) else None
    exec(compile(module, NOTEBOOK.name, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, object] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            shown.append(run_cell("".join(cell["source"]), names))
    setup, trace, losses, result, histogram, table, filtered = shown
    assert setup is None and isinstance(trace, Trace) and isinstance(result, FilterResult)
    assert isinstance(losses, Figure) and isinstance(histogram, Figure) and len(losses.axes) == 2
    for value in (trace, result, table, filtered):
        assert value._repr_html_().count("<table") == 1
    unsafe = np.arange(len(result.removed)) < len(names["unsafe_rows"])
    assert (result.removed == unsafe).all()
    assert (filtered.removed == unsafe).all()
    assert table["forgetting"].is_monotonic_decreasing and table["removed"].sum() == 8
