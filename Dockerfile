# The images of the Flyte tasks (tasks/resources.py): `make images`.
# Pinned like the environments that the tests ran in: constraints.txt, constraints-gpu.txt.
FROM python:3.11-slim-bookworm AS cpu
# Mooncake's libraries, and wget for KubeRay's probes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates libcurl4 libibverbs1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONPATH=/app HF_HOME=/data/huggingface
# flytekit warns of every tuple in a configuration, which it handles well.
ENV FLYTE_SDK_LOGGING_LEVEL=40
# KubeRay ships this folder to every Ray worker: nothing big belongs into it.
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu
COPY workflows workflows
COPY tasks tasks
COPY torchspec_lib torchspec_lib
RUN pip install -c constraints.txt '.[cpu]'
COPY configs configs
COPY examples examples
ARG COMMIT=unknown
RUN echo "$COMMIT" > COMMIT

FROM python:3.12-slim-bookworm AS gpu
# And a compiler for Triton's kernels.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential ca-certificates libcurl4 libibverbs1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONPATH=/app HF_HOME=/data/huggingface
ENV FLYTE_SDK_LOGGING_LEVEL=40
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints-gpu.txt ./
COPY workflows workflows
COPY tasks tasks
COPY torchspec_lib torchspec_lib
RUN pip install -c constraints-gpu.txt '.[gpu,sglang]'
COPY configs configs
COPY examples examples
ARG COMMIT=unknown
RUN echo "$COMMIT" > COMMIT
