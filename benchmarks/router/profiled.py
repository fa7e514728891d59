"""`splitserve` under cProfile: SIGUSR1 begins, SIGUSR2 ends and writes to the file that SPLITSERVE_PROFILE names.

    SPLITSERVE_PROFILE=router.prof python -m benchmarks.router.profiled router ...

So a start and its imports stay out of it. Of C code (grpcio's) only what Python calls is seen, under its caller.
"""

import cProfile
import os
import signal

from splitserve.cli.main import main

if __name__ == "__main__":
    profile = cProfile.Profile()
    signal.signal(signal.SIGUSR1, lambda *_: profile.enable())
    signal.signal(signal.SIGUSR2, lambda *_: profile.dump_stats(os.environ["SPLITSERVE_PROFILE"]))
    main()
