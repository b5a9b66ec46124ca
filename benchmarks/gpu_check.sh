#!/usr/bin/env bash
# benchmarks/gpu_check.sh 1|2|3|4|5|STAGE ...: tests and figures of a GPU, five runs of ten minutes.
#
# docs/benchmarks.md says what the runs are. Results go to $OUT, or to benchmark-output/gpu_check;
# RESUME=FOLDER goes on with those of an earlier run, LIMIT=SECONDS is for all stages together.
# DEVICE=cpu is a dry run, QUICK=1 does little of each stage, and COMMIT= says what is measured where
# there is no git. Needs torch with its triton, and what requirements there are in NEEDED: where no
# registry can be reached, `make gpu-wheels` puts them into build/wheels (WHEELS= names another
# folder), which travels with the files.
set -euo pipefail

cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
python=${PYTHON:-python3}
out=${OUT:-benchmark-output/gpu_check}
wheels=${WHEELS:-build/wheels}
site=build/site
NEEDED="cpuinfo hypothesis jinja2 matplotlib pandas psutil pydantic pytest rich scipy seaborn tqdm tyro xdist"
WANTED="diffusers" # without it whole models are unavailable, and said to be
export PYTHONPATH="$PWD/$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

missing() { # of these modules
    "$python" -c 'import importlib.util as u, sys
print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))' "$@"
}

# shellcheck disable=SC2086  # lists of words
if [ -n "$(missing $NEEDED $WANTED)" ] && compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" --upgrade "$wheels"/*.whl
fi
# shellcheck disable=SC2086
if [ -n "$(missing $NEEDED)" ]; then
    echo "not installed, nor in $wheels: $(missing $NEEDED)" >&2
    exit 3
fi
device=${DEVICE:-cuda}
if [ "$device" = cuda ] && ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "torch finds no GPU" >&2
    exit 3
fi
exec "$python" -m benchmarks.gpu_check --device "$device" --output "$out" \
    ${RESUME:+--resume "$RESUME"} ${LIMIT:+--limit "$LIMIT"} ${QUICK:+--quick} "$@"
