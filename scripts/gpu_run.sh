#!/usr/bin/env bash
# Shows on a GPU host, in this order and each within its time, all that only a GPU can show. docs/gpu.md explains it.
#
#   scripts/gpu_run.sh [OUT] [STEP...]     OUT is out/gpu; steps: doctor kernels handoff copies test-gpu bench-gpu
#
# Wants .venv with the CUDA stack (`make setup`). A step that fails does not keep the next from running; the exit status is
# the number of steps that failed. Each step leaves OUT/STEP.log, and figures where the step says so.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-out/gpu}
steps=("${@:2}")
[ ${#steps[@]} -gt 0 ] || steps=(doctor kernels handoff copies test-gpu bench-gpu)
python=.venv/bin/python
[ -x "$python" ] || { echo "gpu_run: no $python here. Run make setup first." >&2; exit 64; }
mkdir -p "$out"
{
    date -u +%FT%TZ
    git rev-parse HEAD 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} >"$out/host.log" 2>&1
cat "$out/host.log"

failed=0
step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    [[ " ${steps[*]} " == *" $name "* ]] || return 0
    timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=$((failed + 1))
    printf '%-9s exit %3d  %4d s of %4d  %s\n' "$name" $status $((SECONDS - started)) "$limit" "$(tail -n 1 "$out/$name.log")"
}

pytest=("$python" -m pytest -q -rs -p no:warnings)
step doctor 90 "$python" -m sglang_prefillshare.cli doctor
step kernels 120 "${pytest[@]}" -m "not slow" test/kernels
step handoff 120 "${pytest[@]}" -m "not slow" test/host/test_handoff_pair.py
step copies 90 "$python" benchmark/kernels/copy_pages.py --sizes-mib 1,64,256,1024 --page-sizes 1,64 --out "$out/copy_pages.json"
step test-gpu 300 "${pytest[@]}" -m "(gpu or devices) and not slow" test
step bench-gpu 600 "$python" -m sglang_prefillshare.cli bench serving benchmark/serving/gpu.yaml --out "$out/bench"
exit $failed
