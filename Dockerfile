# The broker as one image: `serve` by itself, `worker` and every other command by naming it. docs/deploy-docker.md tells how
# it is built and run. Needs nothing of its base but Python: a digest, or a mirror's name, goes into BASE.
ARG BASE=python:3.13-slim-trixie

FROM ${BASE} AS build
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# pip works from an environment of its own, so that there is none in /opt/broker.
RUN python3 -m venv pip && python3 -m venv --without-pip /opt/broker
COPY requirements.lock ./
# Index settings and a private authority reach pip as secrets of the build, so no layer has them.
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca,required=false \
    pip/bin/pip --python /opt/broker/bin/python install --require-hashes --no-deps --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY broker broker
COPY providers providers
# The lock holds what builds the package too; that goes again, and `pip check` tells if something else needed it.
RUN pip/bin/pip --python /opt/broker/bin/python install --no-deps --no-build-isolation --no-index . \
    && pip/bin/pip --python /opt/broker/bin/python uninstall --yes --quiet \
        editables hatchling pathspec pluggy tomlkit trove-classifiers \
    && pip/bin/pip --python /opt/broker/bin/python check

FROM ${BASE}
# Whoever gets in finds no setuid program and no pip.
RUN groupadd --gid 10001 broker \
    && useradd --no-log-init --uid 10001 --gid broker --no-create-home --home-dir /data --shell /usr/sbin/nologin broker \
    && install --directory --owner broker --group broker --mode 0700 /data \
    && install --directory --mode 0755 /etc/broker \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3.*/site-packages/pip* /usr/local/lib/python3.*/ensurepip/_bundled
COPY --from=build /opt/broker /opt/broker
ENV PATH=/opt/broker/bin:$PATH LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 BROKER_DATA_DIR=/data
VOLUME /data
# Where `.env` and `broker.toml` are looked for; not the volume, so that nobody who can write there can change a setting.
WORKDIR /etc/broker
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# No shell, and no proxy of the environment in between. `worker` does not listen: run it with the check disabled.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-Ic", "from http.client import HTTPConnection as To; c = To('127.0.0.1', 8000, timeout=4); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["broker"]
CMD ["serve", "--host", "0.0.0.0"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="credential-broker" \
    org.opencontainers.image.description="OAuth and credential broker" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="${SOURCE}"
