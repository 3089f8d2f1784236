#!/usr/bin/env bash
# The quick tests with the oldest versions that pyproject.toml allows, or with the newest, in a fresh environment:
# `tests/compat/run.sh lowest-direct` or `tests/compat/run.sh highest`; `TORCH=2.6.0` sets torch's version, which is otherwise the one
# that CI has (older builds for the CPU are not on PyPI). `UV_FIND_LINKS` names a folder of wheels, where torch is not on PyPI as it should be.
set -euo pipefail
cd "$(dirname "$0")/../.."
resolution=${1:-lowest-direct}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "torch==${TORCH:-2.13.0}" > "$folder/override.txt"
python3 -m venv "$folder/tools" && "$folder/tools/bin/pip" install --quiet uv
"$folder/tools/bin/uv" venv --quiet "$folder/venv"
"$folder/tools/bin/uv" pip install --quiet --python "$folder/venv" --resolution "$resolution" --override "$folder/override.txt" \
    -e ".[test]"
"$folder/tools/bin/uv" pip list --python "$folder/venv" 2> /dev/null |
    grep -E "^(transformers|trl|peft|accelerate|datasets|torch|numpy|pyarrow|typer|scikit-learn) "
"$folder/venv/bin/python" -m pytest -q -n 2 --dist loadfile tests --ignore tests/test_demo.py --ignore tests/test_benchmarks.py \
    --ignore tests/test_review.py --ignore tests/test_docs.py --ignore tests/test_distributed.py --ignore tests/test_crashes.py
