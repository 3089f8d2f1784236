#!/usr/bin/env bash
# Run the quick tests in a fresh environment with the oldest or the newest versions that pyproject.toml allows:
# `tests/compat/run.sh lowest-direct` or `tests/compat/run.sh highest`.
# `TORCH=2.6.0` sets the version of torch. The default is the version in CI; older CPU builds are not on PyPI.
# `UV_FIND_LINKS` names a folder with wheels of torch, if PyPI does not have the wanted one.
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
"$folder/venv/bin/python" -m pytest -q -n 2 --dist loadfile tests --ignore tests/cli/test_demo.py --ignore tests/test_benchmarks.py \
    --ignore tests/reports/test_review_page.py --ignore tests/test_docs.py --ignore tests/integration/test_distributed.py \
    --ignore tests/integration/test_crashes.py \
    --deselect tests/test_docs_tables.py::test_the_page_of_the_commands_is_current
