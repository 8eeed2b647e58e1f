"""Long runs with big numbers: `python -m tests.soak`."""
