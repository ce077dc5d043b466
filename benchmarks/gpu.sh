#!/usr/bin/env bash
# What a GPU makes of tessellar, in one command of at most 8 minutes: benchmarks/gpu.sh [OPTIONS OF gpu.py]
# Needs torch 2.9 or newer, numpy, einops and safetensors, no data and no network. Writes gpu.json and gpu.md here.
cd "$(dirname "$0")/.." || exit 1
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
