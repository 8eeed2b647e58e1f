"""A keeper whose workers are `fake_worker`, and whose trial of a new program fails if there is a file `broken`.

With a file `die` it ends at once. $FAKE_PROBE_SECONDS: how often workers are asked whether they live.
"""

import os
import sys
from pathlib import Path

from snapshotter import keeper, watchdog

if __name__ == "__main__":
    root, address = sys.argv[1:]
    worker = str(Path(__file__).with_name("fake_worker.py"))
    if Path(root, "die").exists():
        sys.exit(9)
    watchdog.PROBE_SECONDS = float(os.environ.get("FAKE_PROBE_SECONDS", watchdog.PROBE_SECONDS))
    os.umask(0o077)
    Path(root).mkdir(exist_ok=True)
    commands = {name: [sys.executable, "-P", worker, name, root] for name in keeper.MODULES}
    trial = ["/bin/sh", "-c", f"if [ -e {root}/broken ]; then cat {root}/broken; exit 1; fi"]
    sys.exit(keeper.supervise(root, address, commands, trial))
