# The program with all its dependencies, for one machine, KubeRay or any other container host (docs/install.md).
#   CUDA: docker build --build-arg DEVICE=cuda -t latent-control:0.1.0-cuda .
#   CPU:  docker build --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU builds> -t latent-control:0.1.0-cpu .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS build
ARG DEVICE=cpu
ARG EXTRAS=serve,tasks
# pip reads it: where the CPU build of torch lies; the default index has torch for CUDA, with its libraries.
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
RUN python -m venv /venv
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY configs configs
COPY latent_control latent_control
COPY learners learners
COPY pipeline pipeline
COPY rollout_workers rollout_workers
RUN /venv/bin/pip install --no-cache-dir -c requirements.lock ".[${EXTRAS}]" \
    && /venv/bin/python -c "import sys, torch; found = 'cuda' if torch.version.cuda else 'cpu'; sys.exit(found != '${DEVICE}' and f'torch {torch.__version__} is for {found}, asked for was DEVICE=${DEVICE}: give PIP_EXTRA_INDEX_URL')"

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
# libseccomp2: the walls around verifiers; wget: KubeRay's probes; git, bash: what RayJobs and people call.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash git libseccomp2 wget \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /venv /venv
# Any user may run it (--user 12345, OpenShift): nothing is written outside of the working folder and TMPDIR.
RUN mkdir /data && chmod 1777 /data
ENV PATH=/venv/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/data/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
USER 1000:1000
ENTRYPOINT ["latent-control"]
CMD ["--help"]
