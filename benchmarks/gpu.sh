#!/bin/sh
# Measure scoring on this machine's GPU, in at most five minutes and without a network: `benchmarks/gpu.sh OUTPUT_FOLDER`.
# Further arguments are those of benchmarks/gpu.py; `--smoke` uses tiny shapes and runs on a CPU too.
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # cuBLAS is deterministic with this setting only
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
