#!/usr/bin/env bash
# Everything that needs a GPU: the tests, then the benchmarks of the ops and of the models. `make gpu` runs it.
#
#   benchmarks/gpu.sh PYTHON [--quick …]   with an interpreter that has torch; further options are kernels.py's
#   benchmarks/gpu.sh --check              only whether this machine has a GPU
#
# Results go to benchmarks/results/<device>, or to $RESULTS. Every part runs, whatever became of those before it; the exit
# status is 1 if one failed.
set -uo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:---check} == --check ]]; then
    ls /dev | grep -qE '^(nvidia[0-9]+|kfd|dxg)$' && exit 0
    echo "make gpu: this machine has no GPU (none of /dev/nvidia0, /dev/kfd, /dev/dxg); nothing was installed or run" >&2
    exit 1
fi

python=$1
shift
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "make gpu: the torch of $python sees no GPU; nothing was run" >&2
    exit 1
}
out=${RESULTS:-benchmarks/results/$("$python" -c 'import torch; from benchmarks.machine import slug; print(slug(torch.device("cuda")))')}
mkdir -p "$out"

failed=()
run() {
    echo "== $*"
    "$@" || failed+=("$*")
}
run "$python" -m pytest -q tests/kernels --device cuda -m "not slow" -n 4 --dist loadgroup
run "$python" benchmarks/kernels.py --out "$out" "$@"
run "$python" benchmarks/throughput.py --json "$out/throughput.json"

echo "results: $out"
[[ ${#failed[@]} == 0 ]] && exit 0
printf 'failed: %s\n' "${failed[@]}" >&2
exit 1
