# docker build --build-arg VERSION="$(.ci/version)" -t bids_dgmseg:0.1.0 .    (docs/how-to/run.md)
# The image needs no network at run time and runs as any user, with any HOME, on a read-only file system.

# Digest of the index of all architectures. Any Debian with Python 3.11 or newer and pip will do.
ARG BASE_IMAGE=docker.io/library/python:3.12-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea

FROM ${BASE_IMAGE} AS build
# cpu or cuda
ARG TORCH=cpu
ARG PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_COMPILE=1 \
    PIP_NO_DEPS=1 \
    PIP_PYTHON=/opt/venv/bin/python
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
RUN PIP_PYTHON= python3 -m venv --without-pip /opt/venv
# PyTorch brings setuptools, which one package without a wheel is built with.
COPY requirements*.lock ./
RUN pip install --require-hashes $PIP_OPTIONS -r requirements-$TORCH.lock \
    && pip install --require-hashes --no-build-isolation $PIP_OPTIONS -r requirements.lock
COPY pyproject.toml README.md LICENSE LICENSE-WEIGHTS ./
COPY bids_dgmseg ./bids_dgmseg
# Tests, C++ headers, test programs and symbol tables of the dependencies take 500 MB. Compiled files are valid whatever
# their date is; a few files are for other versions of Python and cannot be compiled.
RUN pip install --no-build-isolation . \
    && cd /opt/venv/lib/python3*/site-packages \
    && find . -type d -name tests -prune -exec rm -r {} + \
    && rm -r torch/test torch/include \
    && find . \( -path './torch/bin/*' ! -name torch_shm_manager -o -name '*.js.map' -o -name '*.a' \) -type f -delete \
    && strip --strip-unneeded torch/lib/libtorch_*.so cc3d/*.so \
    && (/opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash . || true)

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG VERSION
ARG REVISION
COPY --from=build /opt/venv /opt/venv
# PYTHONNOUSERSITE: Apptainer mounts the host's HOME, whose Python packages must be ignored. LOGNAME: libraries
# look up a user name, which an arbitrary user id does not have. SINGULARITY_NO_EVAL: Apptainer evaluates arguments in
# a shell without it. BIDS_DGMSEG_IMAGE: the results' dataset_description.json names it.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    LOGNAME=bids \
    XDG_CACHE_HOME=/tmp/.cache \
    SINGULARITY_NO_EVAL=1 \
    BIDS_DGMSEG_IMAGE="bids_dgmseg:${VERSION:-latest}"
# The base image has no compiled files of the standard library, and a read-only container cannot write any: compiling
# them at each start would take a second. The app is the default command; `dgmseg COMMAND ...` runs the other one.
RUN python -m compileall -qq -j 0 --invalidation-mode unchecked-hash -x '/(site-packages|test|tests|idlelib|lib2to3)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && printf '%s\n' '#!/bin/sh' 'case $1 in dgmseg | bids_dgmseg) exec "$@" ;; *) exec bids_dgmseg "$@" ;; esac' \
        >/usr/local/bin/entrypoint \
    && chmod 755 /usr/local/bin/entrypoint \
    && useradd --uid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin bids \
    && test "${VERSION:+bids_dgmseg $VERSION}" = "${VERSION:+$(bids_dgmseg --version)}"
LABEL org.opencontainers.image.title="bids_dgmseg" \
      org.opencontainers.image.description="BIDS App: segment and measure deep gray nuclei on quantitative susceptibility maps" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-4.0 AND 3D-Slicer-1.0" \
      org.opencontainers.image.authors="The bids_dgmseg developers"
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["entrypoint"]
