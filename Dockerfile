# bids_dgmseg as a container: docker build -t bids_dgmseg:0.1.0 .
# Nothing is fetched at run time; the image runs as any user, with any HOME or none, on a read-only file system.

FROM python:3.12-slim AS build
# CPU wheels by default; for a GPU: --build-arg TORCH_OPTIONS=
ARG TORCH_OPTIONS="--index-url https://download.pytorch.org/whl/cpu"
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# torchvision comes with a dependency and must be of torch's build.
RUN python -m venv /opt/venv && pip install $TORCH_OPTIONS torch torchvision
WORKDIR /src
COPY pyproject.toml README.md LICENSE LICENSE-WEIGHTS ./
COPY bids_dgmseg ./bids_dgmseg
RUN pip install . "bids-validator-deno>=2.0"

FROM python:3.12-slim
LABEL org.opencontainers.image.title="bids_dgmseg" \
      org.opencontainers.image.description="BIDS App: segment the deep nuclei of the brain on quantitative susceptibility maps and measure them" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-4.0" \
      org.opencontainers.image.authors="The bids_dgmseg developers"
COPY --from=build /opt/venv /opt/venv
# A host's own packages must not leak in (Apptainer mounts HOME); a user id without a name must do.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    LOGNAME=bids \
    XDG_CACHE_HOME=/tmp/.cache
WORKDIR /tmp
ENTRYPOINT ["bids_dgmseg"]
