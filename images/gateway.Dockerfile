# The gateway: no torch, no compiler, no root.   docker build -f images/gateway.Dockerfile -t octavo-gateway .
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes -r images/locks/build.txt \
 && /build/bin/pip wheel --no-deps --no-build-isolation -C wheel.cmake=false -w /wheels .
RUN python -m venv /opt/octavo && /opt/octavo/bin/pip install --no-cache-dir --require-hashes -r images/locks/gateway.txt \
 && /opt/octavo/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.12-slim
COPY --from=build /opt/octavo /opt/octavo
ENV PATH=/opt/octavo/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT []
CMD ["octavo", "gateway"]
