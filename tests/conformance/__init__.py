"""The snapshot service as its clients see it: over the socket, against a process of its own, with real mounts."""
