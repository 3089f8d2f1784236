#!/usr/bin/env bash
# Two processes on the CPU with a tiny model. On GPUs: drop `use_cpu=True` from ddp.py. On several nodes the output folder
# (`./accelerate_ddp.sh FOLDER`) must be one that all of them see.
set -euo pipefail
cd "$(dirname "$0")"
OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
    --dynamo_backend no --main_process_port 0 ddp.py "$@"
