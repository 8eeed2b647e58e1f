"""End-to-end tests on real containerd, runc, registry and EROFS."""
