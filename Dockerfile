# One image for miners, validators and a whole local swarm; without root, without a wallet inside.
#   docker build -t orion .
# torch's wheels bring CUDA with them, the driver comes from the host (`docker run --gpus all`). For machines without a
# GPU: --build-arg TORCH_INDEX=... with the index of torch's CPU builds makes the image some gigabytes smaller.
FROM python:3.12-slim-trixie AS build
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/orion
COPY constraints.txt ./
RUN /opt/orion/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY subnet subnet
COPY neurons neurons
COPY scripts scripts
RUN /opt/orion/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt .

FROM python:3.12-slim-trixie
# Compiled blocks are built on the machine that runs them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:14.* libc6-dev=2.41-* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /data --no-create-home orion \
    && install --directory --owner orion /data
COPY --from=build /opt/orion /opt/orion
ENV PATH=/opt/orion/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/data \
    ORION_OUT=/data/node \
    ORION_WALLET_PATH=/wallets \
    ORION_CACHE=/data/cache
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8091
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m CMD ["orion", "alive"]
ENTRYPOINT ["orion"]
CMD ["--help"]
