#!/usr/bin/env bash
# A second-order search of 50 epochs, as in the paper, that may be cut off at any time and started again by the same
# line: it goes on where it was, and once it has ended, retrains what it found.
#
#   benchmarks/gpu_search.sh                                        # CIFAR-10, downloaded to data/
#   benchmarks/gpu_search.sh --amp --cuda_graph                     # flags of train_search.py
#   benchmarks/gpu_search.sh --dataset folder --data my/images
#
# NAME tells several searches apart (default: gpu), RETRAIN has flags for train.py besides those of the data set
# (default: --auxiliary --cutout), PYTHON is another interpreter. Exit status: that of the script that was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
name=${NAME:-gpu}

newest() { # the latest run folder of a kind, or nothing
    ls -td runs/"$1-$name"-[0-9]* 2>/dev/null | head -n 1 || true
}

search=$(newest search)
if [ -n "$search" ]; then
    "$python" train_search.py --resume "$search"
else
    "$python" train_search.py --unrolled --save "$name" "$@"
    search=$(newest search)
fi

train=$(newest train)
if [ -n "$train" ]; then
    "$python" train.py --resume "$train"
else
    data=$("$python" - "$search/config.json" <<'PY'
import json, sys
args = json.load(open(sys.argv[1]))["args"]
print(*(f"--{name}={args[name]}" for name in ("dataset", "data", "image_size", "subset") if args[name] is not None), sep="\n")
PY
    )
    mapfile -t data <<<"$data"
    read -ra retrain <<<"${RETRAIN:---auxiliary --cutout}"
    "$python" train.py --arch "$search" --save "$name" "${data[@]}" "${retrain[@]}"
    train=$(newest train)
fi
"$python" test.py --model_path "$train"
