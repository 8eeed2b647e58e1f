"""A keeper whose workers are `fake_worker`."""

import os
import sys
from pathlib import Path

from snapshotter import keeper

if __name__ == "__main__":
    root, address = sys.argv[1:]
    worker = str(Path(__file__).with_name("fake_worker.py"))
    os.umask(0o077)
    Path(root).mkdir(exist_ok=True)
    commands = {name: [sys.executable, "-P", worker, name, root] for name in keeper.MODULES}
    sys.exit(keeper.supervise(root, address, commands))
