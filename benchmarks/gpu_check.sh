#!/usr/bin/env bash
# benchmarks/gpu_check.sh STAGE: one stage of the checks that need a GPU, at most 8 minutes long.
#
#   tests      pytest -m gpu: log and JUnit report
#   tile       the models' calls, up to 128 frames: JSON, table, plot
#   stream     1,024 to 8,192 frames: JSON, table, plot
#   sanitizer  compute-sanitizer's memcheck and racecheck over the smaller tests: logs
#
# Results go to $OUT, or to benchmark-output/ where OUT is not set. Needs torch with its triton, and
# pytest for the tests: where no registry can be reached, put its wheels (pip download pytest -d
# wheels) into a folder and name it in WHEELS. Without matplotlib the plots are left out, and
# `python -m benchmarks.gpu plot FILE.json` draws them elsewhere.
set -euo pipefail

cd "$(dirname "$0")/.."
stage=${1:?"usage: $0 tests|tile|stream|sanitizer"}
out=${OUT:-benchmark-output}
python=${PYTHON:-python3}
limit=480 # seconds
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

need() { # a module, from the registry's wheels at hand if it is not there
    "$python" -c "import $1" 2>/dev/null && return
    if [ -z "${WHEELS:-}" ]; then
        echo "$1 is not installed, and WHEELS names no folder of wheels" >&2
        exit 3
    fi
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" "$1"
}

"$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || {
    echo "torch finds no GPU" >&2
    exit 3
}

case $stage in
tests)
    need pytest
    timeout "$limit" "$python" -m pytest -m gpu tests/backends/test_triton_gpu.py \
        -p no:cacheprovider --durations=15 --junitxml="$out/tests.xml" 2>&1 |
        tee "$out/tests.log"
    ;;
tile | stream)
    need tqdm
    timeout "$limit" "$python" -m benchmarks.gpu "$stage" --seconds 400 \
        --output "$out/$stage.json" 2>&1 | tee "$out/$stage.log"
    ;;
sanitizer)
    need pytest
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [ ! -x "$sanitizer" ]; then
        echo "compute-sanitizer is not installed" | tee "$out/sanitizer.log"
        exit 3
    fi
    # A kernel of PyTorch's own tells whether this machine lets it run at all.
    if ! timeout 60 "$sanitizer" --error-exitcode 9 "$python" -c \
        "import torch; print(torch.ones(8, device='cuda').sum().item())" \
        >"$out/sanitizer.log" 2>&1; then
        echo "compute-sanitizer may not run here" | tee -a "$out/sanitizer.log"
        exit 3
    fi
    # PyTorch's caching allocator would hide accesses past the end of a tensor.
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $((limit / 2 - 30)) \
            "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -m gpu tests/backends/test_triton_gpu.py -k small \
            -p no:cacheprovider --quiet 2>&1 | tee -a "$out/sanitizer.log"
    done
    ;;
*)
    echo "unknown stage $stage" >&2
    exit 2
    ;;
esac
