#!/usr/bin/env bash
# make demo: train a tokenizer and a generator on coloured shapes, sample from them, measure them.
# Everything is written under runs/ and outputs/; a second run starts afresh. The classifier that measures was made by
#   python evaluate.py extractor --data tessellar.data.ShapesData --data.seed 100 --data.length 20000 --data.size 24 \
#       --architecture.arch test_resnet --recipe.epochs 4 --recipe.flip false --out demo/shapes_classifier.safetensors
# on shapes of another seed than the ones trained on here.
set -euo pipefail
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"  # threads that spin for long lose most of their time on shared cores
rm -rf runs/demo-tokenizer runs/demo-generator outputs/demo

python train.py --config configs/demo/tokenizer.yaml --name demo-tokenizer
python train.py --config configs/demo/generator.yaml --name demo-generator
python sample.py runs/demo-generator/export --out outputs/demo --per-class 8 --guidance.scale 2.0 --seed 0
cp runs/demo-tokenizer/pictures/reconstructions_*.png outputs/demo/reconstructions.png
python evaluate.py model runs/demo-generator/export --extractor demo/shapes_classifier.safetensors --count 1000 \
    --guidance.scale 2.0 --seed 10000 --out outputs/demo/evaluation.json
echo "pictures: outputs/demo/grid.png (samples), outputs/demo/reconstructions.png (originals above reconstructions)"
