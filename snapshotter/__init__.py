"""coco-snapshotter: lazily pulled, encrypted and authenticated container images for containerd."""

__version__ = "0.1.0"
