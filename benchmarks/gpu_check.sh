#!/usr/bin/env bash
# Test this code on this machine's GPU, and time involution and the search step there:
#
#   benchmarks/gpu_check.sh [FOLDER]        (default: results-CARD, in the folder where it is called)
#
# FOLDER then holds machine.txt, tests.txt (pytest -m gpu), in search/ a step's time and memory at batch 64 and 256, with
# and without mixed precision and CUDA graphs, in train/ those of a derived network's step, and in float32/ and bfloat16/
# the tables and plots of involution, on an A100 or H100 beside the prediction of RESULTS.md. What was printed is in *.txt
# beside them. PYTHON names another interpreter than `python`. A part that fails does not stop the
# others. Exit status: 0 when all went well, 2 when there is no CUDA device, else 1.
set -uo pipefail

python=${PYTHON:-python}
if ! card=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
    echo "gpu_check.sh: no CUDA device that PyTorch can use: see $python -m torch.utils.collect_env" >&2
    exit 2
fi

folder=${1:-results-$(tr -cs '[:alnum:]' - <<<"$card" | sed 's/-$//')}
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 1

failed=()
part() { # NAME COMMAND...
    "${@:2}" 2>&1 | tee "$folder/$1.txt" || failed+=("$1")
}

part machine "$python" -m torch.utils.collect_env
part tests "$python" -m pytest -m gpu --durations=10
part search "$python" benchmarks/bench_search.py --device cuda --batch_size 64 256 --out "$folder/search"
part train "$python" benchmarks/bench_train.py --device cuda --out "$folder/train"
# the eager step by operator: how much of it is launches, where the rest goes
part profile "$python" benchmarks/bench_search.py --device cuda --batch_size 64 --profile
for dtype in float32 bfloat16; do
    # a batch of 512: one of 64 would time the launches, and fit in the cache of a large card
    TRITON_PRINT_AUTOTUNING=1 part "benchmark-$dtype" "$python" benchmarks/bench_involution.py --device cuda \
        --dtype "$dtype" --batch 512 --out "$folder/$dtype"
done
echo "gpu_check.sh: results for $card are in $folder"
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu_check.sh: failed: ${failed[*]}" >&2
    exit 1
fi
