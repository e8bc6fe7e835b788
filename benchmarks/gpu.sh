#!/usr/bin/env bash
# What needs a GPU, in five parts, each of less than ten minutes on an H100 with 16 cores and useful alone:
#
#   benchmarks/gpu.sh tests   PYTHON    versions, kernels compiled on all cores, a first look, all tests of the kernels
#   benchmarks/gpu.sh kernels PYTHON    the ops beside PyTorch's and libraries', float32 attention
#   benchmarks/gpu.sh models  PYTHON    calls and steps by Python and as graphs, beside REFERENCE too, > 2³¹ elements
#   benchmarks/gpu.sh memory  PYTHON    memcheck and racecheck of every op, ncu of the ops' kernels
#   benchmarks/gpu.sh experiments PYTHON    what is off until measured here: tests of it, and times beside what it would replace
#   benchmarks/gpu.sh --check           only whether this machine has a GPU
#
# PYTHON needs torch, triton, pytest, hypothesis, einops, safetensors, numpy and tqdm; with pytest-xdist tests run beside
# each other, with pytest-timeout none hangs, with matplotlib there are pictures. Each part leaves at most eight small
# files in the folder OUT (default: benchmarks/results/<device>). What a part runs, it runs whatever became of what came
# before; the exit status is 1 if something failed. PROCESSES (default: the cores but two) compile and test; each takes a
# gigabyte or more of the GPU's memory, so that fewer of them leave room for a training beside the tests. REFERENCE: a
# checkout of apple/ml-mdm, measured beside ours. REHEARSE=1 runs, without a GPU, as much of a part as a processor can.
set -uo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:---check} == --check ]]; then
    ls /dev | grep -qE '^(nvidia[0-9]+|kfd|dxg)$' && exit 0
    echo "make gpu: this machine has no GPU (none of /dev/nvidia0, /dev/kfd, /dev/dxg); nothing was installed or run" >&2
    exit 1
fi

part=$1
python=${2:?which Python: benchmarks/gpu.sh $1 PYTHON}
rehearse=${REHEARSE:-}
export CI=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD OMP_NUM_THREADS=1
if [[ -z $rehearse ]]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "make gpu: the torch of $python sees no GPU; nothing was run" >&2
        exit 1
    }
    slug='import torch; from benchmarks.machine import slug; print(slug(torch.device("cuda")))'
    out=${OUT:-benchmarks/results/$("$python" -c "$slug")}
else
    out=${OUT:?a rehearsal needs a folder: REHEARSE=1 OUT=…}
fi
mkdir -p "$out"
cores=$(env -u OMP_NUM_THREADS nproc) # which would answer 1, the threads of a process
processes=${PROCESSES:-$((cores > 3 ? cores - 2 : 1))}

failed=()
# run SECONDS LOG COMMAND…: at most so long, its output in $out/LOG too, or nowhere else if LOG is -. It is interrupted as
# by Ctrl-C, so that pytest still says what failed.
run() {
    local limit=$1 log=$2
    shift 2
    echo "== $*"
    if [[ $log == - ]]; then
        timeout -s INT -k 10 "$limit" "$@" || failed+=("$*")
    else
        timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee "$out/$log" || failed+=("$*")
    fi
}
has() { "$python" -c "import $1" 2>/dev/null; }

warm_up() {
    if [[ $rehearse ]]; then
        run 900 - "$python" -m benchmarks.warm_up --target sm_90 --processes 1 --most 2 "$@"
    else
        run 120 - "$python" -m benchmarks.warm_up --processes "$processes" "$@"
    fi
}

# Tests on the GPU, beside each other where pytest can. The timeout's own thread ends a test that waits for a kernel.
options=(-q -p no:cacheprovider --device cuda)
has xdist && options+=(-n "$processes" --dist loadgroup)
has pytest_timeout && options+=(--timeout 150 --timeout-method thread)

# What launches kernels; other tests of the kernels are of Python alone, or of the interpreter.
launching=(tests/kernels/test_{on_gpu,group_norm,group_norm_skip,flash_attention,self_cross_attention}.py
    tests/kernels/test_{temporal_attention,multires,multires_seed,seeded_noise,philox,gradcheck,out_of_bounds}.py
    tests/kernels/test_{torch_integration,backend,plans,accelerate}.py)
has av && has webdataset && launching+=(tests/training/test_graphs.py) # which reads no data, but imports what does

tests() {
    nvidia-smi -L 2>/dev/null
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
    warm_up --cases quick --models mdm_t2i_tiny
    if [[ $rehearse ]]; then
        run 900 tests.log "$python" -m pytest -q -p no:cacheprovider -m gpu --collect-only \
            tests/kernels/test_on_gpu.py
        return
    fi
    export TORCHINDUCTOR_COMPILE_THREADS=1 # or each of the processes that compile beside each other starts as many again
    run 100 first.log "$python" -m pytest "${options[@]}" -m gpu -k "odd_sizes or small or graph" \
        tests/kernels/test_on_gpu.py
    run 340 tests.log "$python" -m pytest "${options[@]}" -m "not slow" -k "not one_pass and not (one and pass) and not by_tma" \
        --junitxml "$out/tests.xml" "${launching[@]}"
}

kernels() {
    warm_up --cases quick
    if [[ $rehearse ]]; then
        run 900 - "$python" benchmarks/kernels.py --device cpu --dtype fp32 --filter temporal --seconds 0 --plot --out "$out"
        return
    fi
    warm_up --cases quick --dtype fp32
    run 430 - "$python" benchmarks/kernels.py --quick --plot --out "$out"
    run 80 - "$python" benchmarks/kernels.py --quick --no-compile --dtype fp32 --filter attention --seconds 0.1 \
        --out "$out/float32"
}

models() {
    if [[ $rehearse ]]; then
        warm_up --cases none --models mdm_t2i_tiny
        run 900 graphs.log "$python" -m benchmarks.graphs --device cpu --models mdm_t2i_tiny --seconds 0
        run 900 - "$python" benchmarks/throughput.py --device cpu --models mdm_t2i_tiny --seconds 0 --json "$out/tiny.json"
        return
    fi
    warm_up --cases none --models mdm_t2i_64,mdm_t2i_256,mdm_t2i_1024
    run 70 graphs.log "$python" -m benchmarks.graphs --models mdm_t2i_64,mdm_t2i_256,mdm_t2i_1024
    run 70 - "$python" benchmarks/throughput.py --cuda-graphs --models mdm_t2i_64 --batch 32 \
        --json "$out/mdm_t2i_64_graphs.json"
    run 80 - "$python" benchmarks/throughput.py --cuda-graphs --models mdm_t2i_256 --batch 16 \
        --json "$out/mdm_t2i_256_graphs.json"
    if [[ ${REFERENCE:-} ]]; then
        local beside=(benchmarks/throughput.py --reference "$REFERENCE" --backward --cuda-graphs --batch 8 --seconds 0.5)
        run 70 official_64.log "$python" "${beside[@]}" --models mdm_t2i_64
        run 100 official_256.log "$python" "${beside[@]}" --models mdm_t2i_256
    fi
    run 80 int32.log "$python" -m pytest -q -p no:cacheprovider --device cuda -m gpu tests/kernels/test_beyond_int32.py
}

memory() {
    local device=cuda every_op
    [[ $rehearse ]] && device=cpu
    every_op="
import torch
torch.set_default_device('$device')
from tests.kernels.calls import EVERY_OP
for name, make in EVERY_OP.items():
    make().run('triton' if '$device' == 'cuda' else 'auto')
    if '$device' == 'cuda':
        torch.cuda.synchronize()
    print(name, flush=True)
"
    if [[ $rehearse ]]; then
        run 900 memcheck.log "$python" -c "$every_op"
        return
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run 150 memcheck.log \
        compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -c "$every_op"
    run 120 racecheck.log compute-sanitizer --tool racecheck --error-exitcode 1 "$python" -c "$every_op"
    run 120 ncu.csv ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis \
        -k 'regex:group_|tile_|apply_|flash_|self_cross|loss_level' -c 24 --csv \
        "$python" benchmarks/kernels.py --quick --no-compile --filter 64×256×64² --seconds 0.01 --out "$(mktemp -d)"
}

# One pass of GroupNorm has programs that wait for each other, and a tile by TMA is waited for until all its bytes are
# there: if it hangs, it hangs here, and takes nothing else along.
experiments() {
    warm_up --cases experiments
    if [[ $rehearse ]]; then
        run 900 experiments.log "$python" -m pytest -q -p no:cacheprovider -m gpu -k "one_pass or (one and pass) or by_tma" --collect-only \
            tests/kernels/test_on_gpu.py
        return
    fi
    run 120 one_pass.log "$python" -m pytest "${options[@]}" -x -m "not slow" -k "one_pass or (one and pass)" \
        tests/kernels/test_on_gpu.py tests/kernels/test_group_norm.py tests/kernels/test_group_norm_skip.py
    run 60 by_tma.log "$python" -m pytest "${options[@]}" -x -k by_tma tests/kernels/test_on_gpu.py \
        tests/kernels/test_out_of_bounds.py
    run 280 - "$python" benchmarks/kernels.py --experiments --out "$out/experiments"
}

case $part in
    tests | kernels | models | memory | experiments) "$part" ;;
    *)
        echo "benchmarks/gpu.sh: no part $part; there are tests, kernels, models, memory, experiments" >&2
        exit 2
        ;;
esac
echo "results: $out"
[[ ${#failed[@]} == 0 ]] && exit 0
printf 'failed: %s\n' "${failed[@]}" >&2
exit 1
