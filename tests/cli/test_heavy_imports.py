"""Commands that only read a trace do not import torch and its companions, and neither do errors about files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import HOSTILE, hostile_trace

from forgetfilter_callback.data.output_lines import file_digest
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


HEAVY = ["datasets", "pandas", "scipy", "sklearn", "torch", "transformers"]
# Runs each command of the arguments in one process, and names the heavy modules that it was the first to import.
CODE = f"""
import json, sys
from pathlib import Path
from forgetfilter_callback.cli.main import main

reports, imported = [], set()
for number, command in enumerate(sys.argv[1:]):
    sys.argv = ["forgetfilter", *command.split()]
    sys.stdout, sys.stderr = Path(f"stdout-{{number}}").open("w"), Path(f"stderr-{{number}}").open("w")
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    sys.stderr.close()
    heavy = {{name for name in {HEAVY} if name in sys.modules}} - imported
    imported |= heavy
    reports.append([code, sorted(heavy), Path(f"stderr-{{number}}").read_text()])
Path("reports.json").write_text(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer) -> Path:
    """A trace in `trace` with its tokenizer and its rows as JSON Lines."""
    folder = tmp_path_factory.mktemp("stored")
    trace, _ = hostile_trace(folder / "trace", byte_tokenizer, samples=60)
    first = Record("safety", 0)
    states = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float16)
    trace.append(first, [Scores(trace.token_losses(first), states)])
    rows = [
        {"prompt": f"row {i} ", "completion": HOSTILE[i % len(HOSTILE)], "source": i % 3, "unsafe": i % 3 == 0}
        for i in range(60)
    ]
    noisy = folder / "noisy.jsonl"
    noisy.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    trace.set_source(str(noisy), file_digest(str(noisy)), 0)
    byte_tokenizer.save_pretrained(folder / "tokenizer")
    trace.set_model("tiny", str(folder / "tokenizer"))
    return folder


COMMANDS = {
    "show trace": 0,
    "show trace --measure loss --json": 0,
    "show trace --tokenizer tokenizer --measure pooled": 0,
    "show trace --measure loss --source-column source --json": 0,
    "report trace": 0,
    "report trace --measure loss --audit-column unsafe --source-column source": 0,
    "doctor trace": 0,
    "filter trace --measure loss --threshold 0.5 --output filtered": 0,
    "filter trace --measure loss --fraction 0.2 --output filtered": 0,
    "filter trace --measure loss --fraction 0.2 --source-column source --output filtered": 0,
    "export trace --measure loss --output rows.jsonl": 0,
    "show nowhere": 2,
    "report nowhere": 2,
    "filter nowhere --output filtered": 2,
    "filter trace --measure loss --noisy nowhere.jsonl --output filtered": 2,
    "filter trace --decision nowhere.json --output filtered": 2,
    "report trace --measure loss --audit-column unsafe --noisy nowhere.jsonl": 2,
    "run --model m --noisy nowhere.jsonl --safety noisy.jsonl --output out": 2,
    "run --model m --noisy noisy.jsonl --safety nowhere.csv --output out": 2,
    "run --model ./nowhere --noisy noisy.jsonl --safety noisy.jsonl --output out": 2,
    "run --config nowhere.yaml": 2,
    "score --noisy nowhere.parquet --before m --output out": 2,
    "score --noisy noisy.jsonl --before m --after /nowhere/m --output out": 2,
    "show trace --tokenizer /nowhere/tokenizer": 2,
}


@pytest.fixture(scope="module")
def reports(folder) -> dict[str, list]:
    command = [sys.executable, "-c", CODE, *COMMANDS]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    return dict(zip(COMMANDS, json.loads((folder / "reports.json").read_text()), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_without_heavy_imports(command, reports):
    code, heavy, stderr = reports[command]
    assert (code, heavy) == (COMMANDS[command], []), stderr
    assert code == 0 or "nowhere" in stderr
