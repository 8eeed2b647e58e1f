"""Real things for tests, the demo and the benchmarks: registry, containerd, our daemon, images, a shaped link.

Everything runs on loopback, inside one temporary directory, in processes of its own; `machine.Work` removes all of it.
"""
