"""`python -m snapshotter` is the console script."""

from snapshotter.cli.main import main

raise SystemExit(main())
