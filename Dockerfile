# Build: docker build -t bids_dgmseg:0.1.0 .
# The image needs no network at run time and runs as any user, with any HOME, on a read-only file system.

FROM python:3.12-slim AS build
# CPU wheels by default; for a GPU: --build-arg TORCH_OPTIONS=
ARG TORCH_OPTIONS="--index-url https://download.pytorch.org/whl/cpu"
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# torchvision is a dependency of nnunetv2 (through timm); its build must match that of torch.
RUN python -m venv /opt/venv && pip install $TORCH_OPTIONS torch torchvision
WORKDIR /src
COPY pyproject.toml README.md LICENSE LICENSE-WEIGHTS ./
COPY bids_dgmseg ./bids_dgmseg
RUN pip install . "bids-validator-deno>=2.0"

FROM python:3.12-slim
LABEL org.opencontainers.image.title="bids_dgmseg" \
      org.opencontainers.image.description="BIDS App: segment and measure deep gray nuclei on quantitative susceptibility maps" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-4.0" \
      org.opencontainers.image.authors="The bids_dgmseg developers"
COPY --from=build /opt/venv /opt/venv
# PYTHONNOUSERSITE: Apptainer mounts the host's HOME, whose Python packages must be ignored. LOGNAME: libraries
# look up a user name, which an arbitrary user id does not have.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    LOGNAME=bids \
    XDG_CACHE_HOME=/tmp/.cache
WORKDIR /tmp
ENTRYPOINT ["bids_dgmseg"]
