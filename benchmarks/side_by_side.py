"""Profiles an engine as it serves on a shared machine: with a neighbour of its kind computing on the next core."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitserve.latency.profile import Profile, read

MINUTES = 4


def profiled(cluster: Mapping[str, Any], scratch: Path, out: Path, longest_tokens: int) -> Profile:
    """Measured now, as `splitserve profile` does, or what an earlier run has left in `out`. Two engines at once, each
    on a core, as they serve later: beside a neighbour that computes a step costs more than a tenth more."""
    if not out.exists():
        config = scratch / "cluster.yaml"
        config.write_text(json.dumps(cluster))
        cores = sorted(os.sched_getaffinity(0))[:2]
        files = (out, scratch / "neighbour.json")
        running = [_profile(config, file, core, longest_tokens) for file, core in zip(files, cores, strict=True)]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit("profiling failed; see above")
    return read(out)


def _profile(config: Path, out: Path, core: int, longest_tokens: int) -> subprocess.Popen[bytes]:
    options = ["--out", str(out), "--longest", str(longest_tokens), "--minutes", str(MINUTES)]
    command = [sys.executable, "-m", "splitserve", "profile", str(config), *options]
    return subprocess.Popen(command, stdout=sys.stderr, preexec_fn=lambda: os.sched_setaffinity(0, {core}))
