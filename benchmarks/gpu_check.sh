#!/usr/bin/env bash
# benchmarks/gpu_check.sh STAGE: one stage of the checks that need a GPU, at most 8 minutes long.
#
#   tests      pytest -m gpu: log and JUnit report
#   tile       the models' calls, up to 128 frames, against all peers that need no compiling
#   compiled   some of them against torch.compile and two-pass FlexAttention
#   stream     256 to 8,192 frames
#   frames     attention over frames at the sizes of five video transformers, under every rule
#   frames-compiled   one of them against FlexAttention
#   columns    cross-attention with the maps of some words, at the levels of a UNet
#   models     gradients, maps, whole UNet steps, the overhead of a call
#   sanitizer  compute-sanitizer's memcheck and racecheck over the smaller tests: logs
#
# Those in between write JSON lines, tables and a page: see `python -m benchmarks run --help`.
# Results go to $OUT, or to benchmark-output/ where OUT is not set. Needs torch with its triton,
# pytest, what the benchmarks import (NEEDED), and diffusers for the steps: where no registry can be
# reached, put their wheels (pip download NAME -d wheels) into a folder and name it in WHEELS.
set -euo pipefail

cd "$(dirname "$0")/.."
stage=${1:?"usage: $0 tests|tile|compiled|stream|frames|frames-compiled|columns|models|sanitizer"}
out=${OUT:-benchmark-output}
python=${PYTHON:-python3}
limit=480 # seconds
NEEDED="tqdm rich seaborn jinja2 pydantic tyro psutil cpuinfo scipy pytest"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

need() { # a module, from the registry's wheels at hand if it is not there
    "$python" -c "import $1" 2>/dev/null && return
    if [ -z "${WHEELS:-}" ]; then
        echo "$1 is not installed, and WHEELS names no folder of wheels" >&2
        exit 3
    fi
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" "${1/#cpuinfo/py-cpuinfo}"
}

"$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || {
    echo "torch finds no GPU" >&2
    exit 3
}

need_all() {
    for module in $NEEDED; do need "$module"; done
}

measure() { # suites and options
    need_all
    timeout "$limit" "$python" -m benchmarks run --device cuda --output "$out/$stage.jsonl" \
        --stop-after $((limit - 60)) --suites "$@" 2>"$out/$stage.log"
}

case $stage in
tests)
    need_all
    need hypothesis
    timeout "$limit" "$python" -m pytest -m gpu tests/attention/test_triton_gpu.py \
        tests/benchmarks/test_clock.py -p no:cacheprovider --durations=15 --junitxml="$out/tests.xml" 2>&1 |
        tee "$out/tests.log"
    ;;
tile)
    measure short --peers eager sdpa-bias xformers-bias strength-0 sdpa xformers flash-attn
    ;;
compiled)
    measure short --peers eager eager-compiled flex sdpa --frames 16 64 128 \
        --models videocrafter2-320x512 animatediff-sd15-512x512
    ;;
stream)
    measure long
    ;;
frames)
    measure frames --peers composed sdpa-bias ultravico strength-0 sdpa flash-attn sage \
        --transformers wan2.1-1.3b-480p wan2.1-14b-480p hunyuanvideo-720p cogvideox-5b-480p \
        ltx-2-512x768
    ;;
frames-compiled)
    measure frames --peers flex-frames strength-0 sdpa --transformers wan2.1-14b-480p
    ;;
columns)
    need_all
    timeout "$limit" "$python" -m benchmarks.columns_gpu --json "$out/columns.json" 2>&1 |
        tee "$out/columns.md"
    ;;
models)
    measure backward maps overhead unet --frames 16 64 --peers eager without-map sdpa
    ;;
sanitizer)
    need pytest
    need hypothesis
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
            "$python" -m pytest -m gpu tests/attention/test_triton_gpu.py -k small \
            -p no:cacheprovider --quiet 2>&1 | tee -a "$out/sanitizer.log"
    done
    ;;
*)
    echo "unknown stage $stage" >&2
    exit 2
    ;;
esac
