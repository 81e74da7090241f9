# The engine for NVIDIA GPUs. CUDA's libraries come with torch; Triton needs a C compiler at run time.
#   docker build -f images/engine-cuda.Dockerfile -t octavo-engine:cuda .
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential cmake ninja-build && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes -r images/locks/build.txt \
 && /build/bin/pip wheel --no-deps --no-build-isolation -w /wheels .
RUN python -m venv /opt/octavo && /opt/octavo/bin/pip install --no-cache-dir --require-hashes -r images/locks/engine-cuda.txt \
 && /opt/octavo/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/octavo /opt/octavo
ENV PATH=/opt/octavo/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
CMD ["octavo", "serve", "--help"]
