# The snapshotter as an image, for nodes where it runs as a privileged container.
#
# Its mounts must reach containerd: run it privileged, with `root` at the same path inside and outside and shared in both
# directions (Kubernetes: mountPropagation: Bidirectional). All its processes end with the container, so images that are
# in use then stop working; a systemd unit (deploy/coco-snapshotter.service) does not have this weakness.

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY snapshotter ./snapshotter
RUN python -m venv /opt/coco-snapshotter \
 && /opt/coco-snapshotter/bin/pip install --no-cache-dir --disable-pip-version-check . \
 && /opt/coco-snapshotter/bin/pip uninstall --yes pip setuptools

FROM ${BASE}
COPY --from=build /opt/coco-snapshotter /opt/coco-snapshotter
COPY deploy/config.toml /etc/coco-snapshotter/config.toml
ENV PATH=/opt/coco-snapshotter/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
STOPSIGNAL SIGTERM
ENTRYPOINT ["coco-snapshotter"]
CMD ["serve"]
