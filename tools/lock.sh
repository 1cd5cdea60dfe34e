#!/usr/bin/env bash
# Resolves the pins in requirements/ from pyproject.toml (`make lock`). Pins that still fit stay as
# they are; delete a line, or the file, to let it move.
set -euo pipefail
cd "$(dirname "$0")/.."

work=build/lock
mkdir -p "$work"
[ -x $work/venv/bin/uv ] || { .venv/bin/python -m venv $work/venv && $work/venv/bin/pip install -q uv; }

# torch's CPU build is installed in a step of its own; the other three have no part in text.
for name in torch torchvision torchaudio torchcodec; do echo "$name; sys_platform == 'never'"; done >$work/left-out.txt
# So torch's own requirements are named here, and the build backend for `pip install -e .`.
printf '%s\n' filelock fsspec jinja2 networkx 'setuptools>=77.0.3' 'sympy>=1.13.3' 'typing-extensions>=4.10' >$work/cpu.in
# The upper bound is vLLM's from Python 3.12 on; one set of pins serves every Python.
echo 'setuptools>=78.1.1,<81' >$work/gpu.in

resolve() { # set, python version, then more arguments; into build/lock/SET.txt
    local set=$1 python=$2
    shift 2
    $work/venv/bin/uv pip compile pyproject.toml "$work/$set.in" --extra "$set" --extra dev --extra docs --quiet --no-header --no-annotate \
        --python-version "$python" --python-platform x86_64-manylinux_2_34 --output-file "$work/$set.txt" "$@"
}

for set in cpu gpu; do
    more=()
    [ $set = gpu ] || more=(--overrides "$work/left-out.txt")
    grep -v '^#' requirements/$set.txt 2>/dev/null | sed 's/ *;.*//' >$work/$set.txt || true
    resolve $set 3.11 "${more[@]}"
    for python in 3.12 3.13 3.14; do # the same pins have to do for all of them
        cp $work/$set.txt $work/$set-3.11.txt
        resolve $set $python "${more[@]}"
        diff $work/$set-3.11.txt $work/$set.txt || { echo "lock: $set differs on Python $python (above); bound it in $0" >&2; exit 1; }
    done
done

{
    echo '# The CPU set, complete: install with --no-deps, after torch-cpu.txt. Written by make lock.'
    sed -E 's/^((intel-|triton).*)$/\1 ; platform_machine == "x86_64"/' $work/cpu.txt
} >requirements/cpu.txt
{
    echo '# Constraints for the CUDA set: pip install -c requirements/gpu.txt -e ".[gpu,dev,docs]". Written by make lock.'
    cat $work/gpu.txt
} >requirements/gpu.txt
