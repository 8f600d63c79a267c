#!/usr/bin/env bash
# Test and time involution on this machine's GPU:
#
#   benchmarks/gpu_check.sh [FOLDER]        (default: results-CARD, in the folder where it is called)
#
# FOLDER then holds machine.txt, tests.txt (pytest -m gpu), benchmark-DTYPE.txt with the blocks that Triton chose, and
# in float32/ and bfloat16/ the tables and plots of bench_involution.py. PYTHON names another interpreter than
# `python`. Exit status: 0 when all tests passed and the benchmark ran, 2 when there is no CUDA device, else another.
set -euo pipefail

python=${PYTHON:-python}
if ! card=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
    echo "gpu_check.sh: no CUDA device that PyTorch can use: see $python -m torch.utils.collect_env" >&2
    exit 2
fi

folder=${1:-results-$(tr -cs '[:alnum:]' - <<<"$card" | sed 's/-$//')}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."

"$python" -m torch.utils.collect_env >"$folder/machine.txt"
"$python" -m pytest -m gpu --durations=10 2>&1 | tee "$folder/tests.txt"
for dtype in float32 bfloat16; do
    # a batch of 512: one of 64 would time the launches, and fit in the cache of a large card
    TRITON_PRINT_AUTOTUNING=1 "$python" benchmarks/bench_involution.py --device cuda --dtype "$dtype" --batch 512 \
        --out "$folder/$dtype" 2>&1 | tee "$folder/benchmark-$dtype.txt"
done
echo "gpu_check.sh: results for $card are in $folder"
