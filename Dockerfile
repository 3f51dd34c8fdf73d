# The service's image; docs/deploy.md says how to build it. `make image-test` builds it and tries it.
# A release pins the base by its digest, too: --build-arg BASE=python:3.11-slim-bookworm@sha256:…
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# cpu, or cuda: PyPI's torch, whose wheels bring CUDA with them.
ARG TORCH=cpu
# A folder with torch's CPU wheel, where its index is out of reach.
ARG UV_FIND_LINKS=
# The root file system is read-only where this runs, so Python can write no bytecode there: without it each start of Ray
# compiles all of Ray, for which KubeRay's init container has neither the time nor the memory. Bytecode by hash holds
# whatever a builder does to the files' times.
ENV UV_COMPILE_BYTECODE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH UV_LINK_MODE=copy UV_SYSTEM_CERTS=1 \
    UV_CACHE_DIR=/cache/uv PIP_CACHE_DIR=/cache/pip
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY requirements requirements
RUN --mount=type=cache,target=/cache \
    python3.11 -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes -r requirements/build.txt
RUN --mount=type=cache,target=/cache \
    torch=(); if [ "${TORCH}" = cpu ] && [ -z "${UV_FIND_LINKS}" ]; then torch=(--torch-backend=cpu); fi \
 && /opt/build/bin/uv venv --python python3.11 /opt/app/venv \
 && /opt/build/bin/uv pip install --python /opt/app/venv --require-hashes -r "requirements/${TORCH}.txt" "${torch[@]}"
COPY package.json package-lock.json ./
# The workbench's packages. Debian's npm: it goes no further than this stage.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/cache \
    apt-get update && apt-get install -y --no-install-recommends npm \
 && npm ci --ignore-scripts --omit=dev --no-audit --no-fund --cache /cache/npm && npm run --silent vendor \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE ./
RUN /opt/build/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o /opt/app/sbom.cdx.json \
    /opt/app/venv/bin/python
COPY serve_app serve_app
COPY deployments deployments
COPY benchmarks benchmarks
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheel .

FROM ${BASE} AS app
# Debian's packages that `optimizations.compile` needs: g++. Where Python is Debian's own: "g++ libpython3.11-dev".
ARG COMPILER=
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# KubeRay's probes use bash and wget. Python's images come without the standard library's bytecode.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget ${COMPILER} \
 && apt-get clean && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 app \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin app \
 && python3.11 -m compileall -q --invalidation-mode unchecked-hash \
      "$(python3.11 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=build /opt/app /opt/app
# Apart from what it needs: a release whose requirements are those of the last one is a layer of a few megabytes.
RUN --mount=type=bind,from=build,source=/opt/build,target=/opt/build \
    --mount=type=bind,from=build,source=/wheel,target=/wheel \
    /opt/build/bin/uv pip install --python /opt/app/venv --no-cache --offline --no-deps /wheel/*.whl \
 && /opt/app/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash \
      /opt/app/venv/lib/python3.11/site-packages/{serve_app,deployments,benchmarks}
COPY container /opt/app
# A login shell, as which KubeRay runs its clean-up of Redis, sets PATH anew.
# hadolint ignore=SC2016
RUN echo 'PATH=/opt/app/venv/bin:$PATH' > /etc/profile.d/flux-fill.sh
# GKE mounts the driver's libraries and programs at /usr/local/nvidia.
ENV PATH=/opt/app/venv/bin:/usr/local/nvidia/bin:${PATH} LD_LIBRARY_PATH=/usr/local/nvidia/lib64 HOME=/tmp \
    RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
WORKDIR /opt/app

FROM app AS weights
# Variants whose weights the image brings, in /weights/cache, with their revisions in /weights/weights.lock.json.
ARG WEIGHTS=
RUN --mount=type=secret,id=hf_token \
    mkdir /weights \
 && if [ -n "${WEIGHTS}" ]; then \
      sed 's|/tmp/fluxfill/weights|/weights|g' serve_config.yaml > /tmp/weights.yaml; \
      if [ -e /run/secrets/hf_token ]; then HF_TOKEN=$(cat /run/secrets/hf_token); export HF_TOKEN; fi; \
      fluxfill weights pull --pin -c /tmp/weights.yaml ${WEIGHTS}; \
    fi

FROM app AS final
# Its owner is the app, also where a volume is made of it.
COPY --from=weights --chown=10001:10001 /weights /weights
ARG VERSION=
ARG REVISION=
ARG SOURCE=
LABEL org.opencontainers.image.title="flux-fill-serve" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
USER 10001:10001
EXPOSE 8080
# For compose and `docker run`; Kubernetes has probes of its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8080/ready"]
# No STOPSIGNAL: Kubernetes would send it to KubeRay's `ray start`, too, which drains its node on SIGTERM only.
CMD ["/opt/app/serve.sh", "serve_config.yaml"]
