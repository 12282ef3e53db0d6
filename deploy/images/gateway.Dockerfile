# The gateway service.
#
#   docker build -f deploy/images/gateway.Dockerfile -t llmos-gateway .
#
# It holds no torch: the gateway never runs a model.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# Another package index, where the usual one cannot be reached.
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /build
# The lock is complete: nothing beside it is installed, and nothing whose hash differs.
COPY requirements/proto.txt requirements/
RUN python3 -m venv /opt/proto \
    && /opt/proto/bin/pip install --no-deps --require-hashes -r requirements/proto.txt
COPY requirements/gateway.txt requirements/
RUN python3 -m venv /opt/llmos \
    && /opt/llmos/bin/pip install --no-deps --require-hashes -r requirements/gateway.txt
COPY protos/generate.py protos/
COPY protos/llmos protos/llmos
RUN /opt/proto/bin/python protos/generate.py

FROM ${BASE_IMAGE}
COPY --from=build /opt/llmos /opt/llmos
COPY --from=build /build/protos/gen /app/protos/gen
COPY services/__init__.py /app/services/
COPY services/mesh /app/services/mesh
COPY services/gateway /app/services/gateway
WORKDIR /app
# The root file system may be read-only: state is on a volume, and what libraries leave goes to /tmp.
ENV PATH=/opt/llmos/bin:$PATH \
    PYTHONPATH=/app:/app/protos/gen \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
ENTRYPOINT ["python", "-m", "services.gateway"]
