#!/usr/bin/env bash
# Run ddp.py in two processes on the CPU: `examples/accelerate_ddp.sh [OUTPUT_DIR]`.
# For GPUs, remove `use_cpu=True` from ddp.py. On several nodes, OUTPUT_DIR must be on a file system that all nodes share.
set -euo pipefail
cd "$(dirname "$0")"
OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
    --dynamo_backend no --main_process_port 0 ddp.py "$@"
