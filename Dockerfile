# A server in a container: docs/deploy.md says how to build and run it.
FROM debian:trixie-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/runner
WORKDIR /src
COPY . .
ARG EXTRAS=cpu,serve
RUN /opt/runner/bin/pip install --no-cache-dir -c requirements.lock ".[$EXTRAS]"

FROM debian:trixie-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home --home-dir /home/runner runner \
    && install -d -o runner -g runner /models
COPY --from=build /opt/runner /opt/runner
USER runner
ENV PATH=/opt/runner/bin:$PATH HF_HOME=/models PYTHONUNBUFFERED=1
VOLUME /models
EXPOSE 8080
# The server is process 1: `docker stop` sends it SIGTERM, and answers that are under way end first.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["runner", "serve", "--host", "0.0.0.0"]
