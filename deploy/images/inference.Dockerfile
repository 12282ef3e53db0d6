# The inference service.
#
#   docker build -f deploy/images/inference.Dockerfile -t llmos-inference .
#
# It holds torch and the packaged model; other models come on a volume.
ARG BASE_IMAGE=python:3.11-slim
# The same Python and the same C library, and a C compiler.
ARG BUILD_IMAGE=python:3.11

FROM ${BUILD_IMAGE} AS build
# Another package index, where the usual one cannot be reached.
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /build
# The lock is complete: nothing beside it is installed, and nothing whose hash differs.
COPY requirements/proto.txt requirements/
RUN python3 -m venv /opt/proto \
    && /opt/proto/bin/pip install --no-deps --require-hashes -r requirements/proto.txt
COPY requirements/inference.txt requirements/
RUN python3 -m venv /opt/llmos \
    && /opt/llmos/bin/pip install --no-deps --require-hashes -r requirements/inference.txt
COPY protos/generate.py protos/
COPY protos/llmos protos/llmos
RUN /opt/proto/bin/python protos/generate.py
# The native step, for all kinds of processors: where the service runs there is no compiler.
COPY services/__init__.py services/
COPY services/inference services/inference
RUN /opt/llmos/bin/python -m services.inference.engine.native.build /build/native

FROM ${BASE_IMAGE}
COPY --from=build /opt/llmos /opt/llmos
COPY --from=build /build/protos/gen /app/protos/gen
COPY services/__init__.py /app/services/
COPY services/mesh /app/services/mesh
COPY services/inference /app/services/inference
COPY --from=build /build/native /app/services/inference/engine/native/prebuilt
WORKDIR /app
# The root file system may be read-only: state is on a volume, and what libraries leave goes to /tmp.
ENV PATH=/opt/llmos/bin:$PATH \
    PYTHONPATH=/app:/app/protos/gen \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
ENTRYPOINT ["python", "-m", "services.inference"]
