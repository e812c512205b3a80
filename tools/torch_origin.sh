# Sourced by setup.sh and lock.sh: where the CPU build of torch comes from. PyPI's build is the CUDA one.
# Sets torch (the requirement) and torch_wheels (a folder that has its wheel, of those PIP_FIND_LINKS names; or empty).
torch="$(grep '^torch==' requirements.in)+cpu"
torch_wheels=
for folder in ${PIP_FIND_LINKS:-}; do
    if compgen -G "$folder/${torch/==/-}-cp311-*_$(uname -m).whl" >/dev/null; then torch_wheels=$folder; fi
done
