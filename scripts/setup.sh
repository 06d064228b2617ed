#!/usr/bin/env bash
# Creates .venv with SGLang, this package and the tools of its tests. Doing it again takes no time until a requirement changes.
#
#   scripts/setup.sh                        picks the stack by whether there is an NVIDIA GPU
#   PREFILLSHARE_STACK=cpu|cuda             chooses it
#   PREFILLSHARE_PYTHON=python3.12          chooses the Python (3.11 or later) that .venv is made of
set -euo pipefail
cd "$(dirname "$0")/.."

say() { if [ -t 2 ]; then printf '\033[1msetup: %s\033[0m\n' "$*" >&2; else printf 'setup: %s\n' "$*" >&2; fi; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

python=${PREFILLSHARE_PYTHON:-python3}
command -v "$python" >/dev/null || fail "found no $python, wanted Python 3.11 or later. Install it, or name one with PREFILLSHARE_PYTHON."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" -V 2>&1), wanted 3.11 or later. Name another one with PREFILLSHARE_PYTHON."
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot create virtual environments. Install its venv package (on Debian: apt install python3-venv)."

stack=${PREFILLSHARE_STACK:-}
if [ -z "$stack" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then stack=cuda; else stack=cpu; fi
fi
case $stack in
    cpu | cuda) ;;
    *) fail "PREFILLSHARE_STACK is '$stack', wanted cpu or cuda." ;;
esac

# What .venv is made from; the same again means there is nothing to do.
stamp=.venv/.prefillshare-setup
recipe=$({ echo "$stack $PWD"; "$python" -V; cat requirements/*.txt pyproject.toml scripts/setup.sh; } | sha256sum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ]; then exit 0; fi

SECONDS=0
step() { # TITLE COMMAND...: shows pip's own words only when it fails
    local title=$1 log started=$SECONDS
    shift
    log=$(mktemp)
    say "$title ..."
    if ! "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        fail "'$*' failed; see above. Run this again when its cause is gone, what is done is kept."
    fi
    rm -f "$log"
    say "$title: $((SECONDS - started)) s"
}

rm -f "$stamp"
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    step "virtual environment" "$python" -m venv --clear .venv
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check install --no-compile) # the step "bytecode" does it on all cores

if [ "$stack" = cpu ]; then
    step "SGLang's light CPU stack (1-2 minutes, 3 GB)" \
        "${pip[@]}" --no-deps -r requirements/cpu.txt -r requirements/dev.txt -r requirements/demo.txt -r requirements/train.txt -r requirements/eval.txt
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        # pip was offered the CUDA build only, which does not load without the libraries it depends on.
        step "libraries of the torch that pip chose (several GB)" "${pip[@]}" "$(grep -o '^torch==[^ ]*' requirements/cpu.txt)"
    fi
else
    step "SGLang with its CUDA dependencies (about 6 minutes, 11 GB)" "${pip[@]}" --no-deps -r requirements/cuda.txt
    step "tools" "${pip[@]}" --no-deps -r requirements/dev.txt -r requirements/demo.txt -r requirements/train.txt -r requirements/eval.txt
fi
step "this package" "${pip[@]}" --no-deps --no-build-isolation --editable .
# Every worker is three processes that import some 10,000 files each: compiled once here, on all cores, instead of at the
# first start, or at every start where PYTHONDONTWRITEBYTECODE is set. Files for other Python versions do not compile.
step "bytecode" sh -c '.venv/bin/python -m compileall -q -j 0 .venv/lib/python*/site-packages >/dev/null 2>&1 || true'
step "a look at what was installed" .venv/bin/python -c 'import torch, sglang, sglang_prefillshare'

echo "$recipe" >"$stamp"
say "the $stack stack is ready in .venv after $SECONDS s"
