# The pipeline on a CPU: docs/containers.md says how to use it.
#
#     docker build -t trnlora .
#     docker run --rm -it --init -v trnlora:/home/trnlora trnlora make repro
#
# The volume is the home directory: the project with its results and DVC's cache, and the caches of the model hub and
# of vLLM. Docker fills an empty volume with what the image has there, so a second run finds everything up to date.
FROM debian:12.15-slim

# hadolint: versions of Debian's packages are not pinned, since Debian keeps only the newest of a release.
# vLLM's kernels load libnuma1; python3-dev and g++ compile what torch.compile writes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ gcc git libnuma1 make python3 python3-dev \
       python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Build it with your own number, --build-arg UID="$(id -u)", to mount a folder of yours.
ARG UID=1000
RUN useradd --create-home --uid "$UID" --shell /bin/bash trnlora \
    && install -d -o trnlora -g trnlora /opt/trnlora /home/trnlora/trnlora /home/trnlora/trnlora/tools \
       /home/trnlora/trnlora/trnlora
# By its number: Kubernetes' runAsNonRoot does not look up names.
USER $UID
WORKDIR /home/trnlora/trnlora

# The environment is outside of the volume: it is that of the image, also after a new build, and is not copied.
# An index or a mirror that has torch's wheel.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The layer is made again when one of the copied files changes. pyproject.toml names README.md and LICENSE too, for which
# empty ones do. Bytecode: each new container would compile what it imports, 10 s for vLLM's server.
COPY --chown=trnlora:trnlora pyproject.toml requirements.lock Makefile ./
COPY --chown=trnlora:trnlora tools/environment.sh tools/
COPY --chown=trnlora:trnlora trnlora/__init__.py trnlora/
RUN python3 -m venv /opt/trnlora \
    && ln -s /opt/trnlora .venv \
    && touch README.md LICENSE \
    && UV_COMPILE_BYTECODE=1 make setup \
    && rm -rf ~/.cache

COPY --chown=trnlora:trnlora . .
# .dockerignore leaves out .git/config, which can hold a password for the remote. `git init` writes a new one, and makes
# a repository where there is none, because DVC needs one. The files are newer than the environment that was made of
# them, if Docker took that from its cache.
RUN git init --quiet \
    && touch .venv/.ready

# vLLM's server, if it listens on 0.0.0.0.
EXPOSE 8000
CMD ["make", "help"]
