#!/usr/bin/env bash
# make demo: train a tokenizer and a generator on coloured shapes, sample from them, measure them.
# Everything is written under runs/ and outputs/; a second run starts afresh.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf runs/demo-tokenizer runs/demo-generator outputs/demo

python train.py --config configs/demo/tokenizer.yaml --name demo-tokenizer
python train.py --config configs/demo/generator.yaml --name demo-generator
python sample.py runs/demo-generator/export --out outputs/demo --per-class 20 --guidance.scale 1.5 --seed 0
