# The engine for CPUs, with its native kernels.   docker build -f images/engine-cpu.Dockerfile -t octavo-engine:cpu .
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential cmake ninja-build && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes -r images/locks/build.txt \
 && /build/bin/pip wheel --no-deps --no-build-isolation -w /wheels .
RUN python -m venv /opt/octavo && /opt/octavo/bin/pip install --no-cache-dir --require-hashes -r images/locks/engine-cpu.txt \
 && /opt/octavo/bin/pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
 && /opt/octavo/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/octavo /opt/octavo
ENV PATH=/opt/octavo/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
CMD ["octavo", "serve", "--help"]
