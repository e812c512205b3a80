#!/usr/bin/env bash
# The environment of this project, from pyproject.toml's dependency groups. Called by make.
#
#     tools/environment.sh setup STAMP     make .venv from requirements.lock, then touch STAMP
#     tools/environment.sh setup-xla       make .venv-xla from pyproject.toml's group xla, for the tests on torch_xla
#     tools/environment.sh lock            compile pyproject.toml's group dev into requirements.lock
#
# Why no uv.lock: it writes down one address for each file. torch's would be in PyTorch's index, so that `uv lock` and
# `uv sync` would fail wherever torch comes from a folder or a mirror; and no other package could come from a mirror of
# PyPI. requirements.lock has versions and hashes alone. torch is not in it: each index and folder that TORCH_INDEX or
# PIP_FIND_LINKS may name can have a wheel of its own, with a hash of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TORCH_INDEX:=https://download.pytorch.org/whl/cpu}"
torch=$(sed -n 's/^ *"\(torch==[^"]*+cpu\)".*/\1/p' pyproject.toml)
# A folder that has torch's wheel, of those that PIP_FIND_LINKS names; or empty.
torch_wheels=
for folder in ${PIP_FIND_LINKS:-}; do
    if compgen -G "$folder/${torch/==/-}-cp311-*_$(uname -m).whl" >/dev/null; then torch_wheels=$folder; fi
done

export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
# The certificates that the system trusts, as pip does: a company's proxy signs with its own. uv brings others for a
# system that has none.
if compgen -G '/etc/ssl/certs/*' >/dev/null; then export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}; fi

uv_install() {
    .venv/bin/uv pip install --no-config --quiet --python .venv/bin/python --no-deps "$@"
}

make_venv() {
    local candidate python=
    for candidate in ${PYTHON:-python3.11 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [[ -z $python ]]; then
        echo "error: Python 3.11 is needed and ${PYTHON:-python3.11 or python3} is not that: install it, or name it with PYTHON=" >&2
        exit 1
    fi
    # A virtual environment whose Python is gone, or that is incomplete, is made again.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
}

# torch comes first and on its own, from an index given for that one command only: an index that cannot be reached
# would stop or slow down every other package.
install_torch() {
    if [[ -n $torch_wheels ]]; then
        echo "setup: $torch from $torch_wheels"
        uv_install --no-index --find-links "$torch_wheels" "$torch"
        return
    fi
    echo "setup: $torch from $TORCH_INDEX"
    uv_install --index-url "$TORCH_INDEX" "$torch" || {
        echo "error: no $torch from $TORCH_INDEX: name an index that has it with TORCH_INDEX=, or a folder with its wheel" \
            "in the environment variable PIP_FIND_LINKS" >&2
        exit 1
    }
}

# The real torch_xla works with the torch of its own release only, so it has an environment of its own. TORCH_INDEX has a
# CPU build of that torch. PyPI's has CUDA's libraries with it, 7 GB, and works too.
setup_xla() {
    local xla_torch
    xla_torch=$(sed -n 's/^ *"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
    .venv-xla/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m venv --clear .venv-xla
    local install=(.venv/bin/uv pip install --no-config --quiet --python .venv-xla/bin/python)
    echo "setup-xla: $xla_torch+cpu from $TORCH_INDEX"
    "${install[@]}" --index-url "$TORCH_INDEX" "$xla_torch+cpu" 2>/dev/null || {
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

# What pyproject.toml's overrides leave out must be absent, and nothing else may be missing or of a wrong version.
check_venv() {
    local left_out
    left_out=$(sed -n "s/^ *\"\([a-z]*\); sys_platform == 'never'\".*/\1/p" pyproject.toml | paste -sd '|')
    if .venv/bin/python -m pip list --format freeze --disable-pip-version-check | grep -E "^($left_out)=="; then
        echo "error: the package above is the CUDA build and breaks the CPU torch: remove .venv and run make setup again" >&2
        exit 1
    fi
    if .venv/bin/python -m pip check | grep -vE "requires ($left_out), which is not installed|No broken requirements"; then
        echo "error: the environment does not fit together (above): remove .venv and run make setup again" >&2
        exit 1
    fi
}

setup() {
    local stamp=$1
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

# Exact versions with hashes, for Python 3.11 on Linux. Versions that requirements.lock has already stay as they are where
# they still fit. torch stays out, but its CPU build must be seen, or CUDA's packages come in.
lock() {
    local origin=(--index "$TORCH_INDEX" --index-strategy unsafe-best-match)
    if [[ -n $torch_wheels ]]; then origin=(--find-links "$torch_wheels"); fi
    .venv/bin/uv pip compile --group dev --quiet "${origin[@]}" --python .venv/bin/python \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
        --no-emit-package torch --no-emit-index-url --no-emit-find-links --no-annotate --no-header \
        --output-file requirements.lock
    echo "requirements.lock: $(grep -c '==' requirements.lock) packages; 'make setup' installs them"
}

case "${1:-}" in
    setup) setup "$2" ;;
    setup-xla) setup_xla ;;
    lock) lock ;;
    *) echo "usage: tools/environment.sh setup STAMP | setup-xla | lock" >&2; exit 2 ;;
esac
