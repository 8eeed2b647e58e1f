"""Real clients: containerd 1.6, 1.7 and 2.x, and ctr, crictl and nerdctl on them."""
