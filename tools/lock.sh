#!/usr/bin/env bash
# Compile requirements.in into requirements.lock: exact versions with hashes, for Python 3.11 on Linux.
# torch itself stays out (setup.sh installs it); its CPU build must be seen all the same, or CUDA's packages come in.
# It has no hash: each index and folder that TORCH_INDEX or PIP_FIND_LINKS may name can have a wheel of its own.
set -euo pipefail
. tools/torch_origin.sh
if [[ -n $torch_wheels ]]; then
    origin=(--find-links "$torch_wheels")
else
    origin=(--index "$TORCH_INDEX" --index-strategy unsafe-best-match)
fi
.venv/bin/uv pip compile requirements.in --quiet --no-config --constraints <(echo "$torch") --overrides overrides.txt \
    "${origin[@]}" --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
    --no-emit-package torch --no-emit-index-url --no-emit-find-links --no-annotate --no-header --output-file requirements.lock
echo "requirements.lock: $(grep -c '==' requirements.lock) packages; 'make setup' installs them"
