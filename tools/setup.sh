#!/usr/bin/env bash
# Make .venv from requirements.lock. Called by make; $1 is the stamp file, written last, when all is well.
#
# torch comes first and on its own, from an index given for that one command only: an index that cannot be reached
# would stop or slow down every other package. --no-deps: the lock is complete, and it leaves out on purpose what
# overrides.txt names.
set -euo pipefail
ready=$1
. tools/torch_origin.sh

python=
for candidate in ${PYTHON:-python3.11 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
if [[ -z $python ]]; then
    echo "error: Python 3.11 is needed and ${PYTHON:-python3.11 or python3} is not that: install it, or name it with PYTHON=" >&2
    exit 1
fi

rm -f "$ready"
# A virtual environment whose Python has gone, or that is half made, is made anew.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv

export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
# The certificates that the system trusts, as pip does: a company's proxy signs with its own. uv brings others for a
# system that has none.
if compgen -G '/etc/ssl/certs/*' >/dev/null; then export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}; fi
uv_install() {
    .venv/bin/uv pip install --no-config --quiet --python .venv/bin/python --no-deps "$@"
}
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$(grep '^uv==' requirements.in)"

if [[ -n $torch_wheels ]]; then
    echo "setup: $torch from $torch_wheels"
    uv_install --no-index --find-links "$torch_wheels" "$torch"
else
    echo "setup: $torch from $TORCH_INDEX"
    uv_install --index-url "$TORCH_INDEX" "$torch" || {
        echo "error: no $torch from $TORCH_INDEX: name an index that has it with TORCH_INDEX=, or a folder with its wheel" \
            "in the environment variable PIP_FIND_LINKS" >&2
        exit 1
    }
fi
echo "setup: $(grep -c '==' requirements.lock) packages from requirements.lock"
uv_install --require-hashes -r requirements.lock
uv_install --no-build-isolation --editable .

# What the overrides leave out must be absent, and nothing else may be missing or of a wrong version.
left_out=$(sed -n 's/^\([a-z]*\);.*/\1/p' overrides.txt | paste -sd '|')
if .venv/bin/python -m pip list --format freeze --disable-pip-version-check | grep -E "^($left_out)=="; then
    echo "error: the package above is the CUDA build and breaks the CPU torch: remove .venv and run make setup again" >&2
    exit 1
fi
if .venv/bin/python -m pip check | grep -vE "requires ($left_out), which is not installed|No broken requirements"; then
    echo "error: the environment does not fit together (above): remove .venv and run make setup again" >&2
    exit 1
fi
touch "$ready"
