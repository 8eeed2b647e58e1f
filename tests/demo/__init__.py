"""The demo: a container from an encrypted image, lazily, with proofs. `python -m tests.demo`."""
