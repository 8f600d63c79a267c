#!/usr/bin/env bash
# A second-order search of 50 epochs, as in the paper, that may be cut off at any time and started again by the same
# line: it goes on where it was, and once it has ended, retrains and tests what it found.
#
#   benchmarks/gpu_search.sh                                        # CIFAR-10, downloaded to data/
#   benchmarks/gpu_search.sh --amp --cuda_graph                     # flags of train_search.py
#   benchmarks/gpu_search.sh --dataset folder --data my/images
#
# NAME tells several searches apart (default: gpu), RETRAIN has flags for train.py besides those of the data set and the
# device (default: --auxiliary --cutout, for images of 32x32 or more), PYTHON is another interpreter. The run folders are
# in runs/ of the folder where this is called. Exit status: that of the script that was stopped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
name=${NAME:-gpu}

newest() { # the latest run folder of a kind that can go on, or nothing
    local stamp='[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]-[0-9]*' checkpoint
    checkpoint=$(compgen -G "runs/$1-$name-$stamp/checkpoint.pt" | sort | tail -n 1) || true
    echo "${checkpoint%/checkpoint.pt}"
}

search=$(newest search)
if [ -n "$search" ]; then
    "$python" "$root/train_search.py" --resume "$search"
else
    "$python" "$root/train_search.py" --unrolled --save "$name" "$@"
    search=$(newest search)
fi

train=$(newest train)
if [ -n "$train" ]; then
    "$python" "$root/train.py" --resume "$train"
else
    settings=$("$python" - "$search/config.json" <<'PY'
import json, sys
args = json.load(open(sys.argv[1]))["args"]
names = "dataset", "data", "image_size", "subset", "fit", "data_in", "workers", "device", "gpu"
flags = [f"--{name}={args[name]}" for name in names if args[name] is not None]
print(*flags, *["--skip_broken"] * args["skip_broken"], sep="\n")
PY
    )
    mapfile -t settings <<<"$settings"
    read -ra retrain <<<"${RETRAIN:---auxiliary --cutout}"
    "$python" "$root/train.py" --arch "$search" --save "$name" "${settings[@]}" "${retrain[@]}"
    train=$(newest train)
fi
"$python" "$root/test.py" --model_path "$train"
