#!/bin/bash
# All measurements of cost on an idle machine, at most 10 minutes: decoding, training steps, memory, growth. Each survives
# the failure of another. bfloat16 is left out where the processor only emulates it.
# From the root of the checkout: benchmarks/all_costs.sh [FOLDER]
out=${1:-outputs/costs}
mkdir -p "$out"
export PYTHONPATH=$PWD
python=${PYTHON:-.venv/bin/python}
types=$("$python" -c 'from tessellar.layers.precision import computes_bfloat16 as b; print("float32" + ",bfloat16" * b())')
failed=0
measure() {  # SECONDS SCRIPT OPTIONS...
    timeout "$1" "$python" "benchmarks/$2.py" "${@:3}" --json "$out/$2.json" || { echo "$2 ended with $?"; failed=1; }
}
measure 150 decoding --tokens 48 --rounds 2 --no-windows --dtypes "$types"
measure 240 training --rounds 2 --precisions "$types"
measure 100 memory --rounds 1
measure 110 growth --rounds 2 --plot "$out/growth.png"
exit $failed
