#!/bin/bash
# All measurements of cost on an idle machine, about 10 minutes with 2 threads: decoding, training steps, memory, growth.
# From the root of the checkout: benchmarks/all_costs.sh [FOLDER]
set -e
out=${1:-outputs/costs}
mkdir -p "$out"
export PYTHONPATH=$PWD
python=${PYTHON:-.venv/bin/python}
timeout 200 "$python" benchmarks/decoding.py --tokens 64 --rounds 2 --no-windows --json "$out/decoding.json"
timeout 200 "$python" benchmarks/training.py --rounds 3 --json "$out/training.json"
timeout 100 "$python" benchmarks/memory.py --rounds 2 --json "$out/memory.json"
timeout 100 "$python" benchmarks/growth.py --rounds 2 --plot "$out/growth.png" --json "$out/growth.json"
