"""The program of the process for models that look at pictures: reads requests from stdin, and answers on stdout.

It gets no environment of the server's, no network of the hub, one caller's picture at a time, and bounded memory and
time. Arguments: the folder that holds the package, bytes of memory, seconds per request, threads.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import tempfile
from pathlib import Path

_MOST_FILES = 128
_NOWHERE = "/nonexistent"


def main() -> None:
    """Answer requests until stdin ends."""
    package, memory, seconds, threads = Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:5])
    sys.path.insert(0, str(package))
    from stable_diffusion_server.pipelines.vision.vision_messages import HEAD, head_of, packed
    from stable_diffusion_server.pipelines.vision.vision_tasks import VisionTasks

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the server closes stdin
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing a file fails instead of ending the process
    limit_process(memory)
    tempfile.tempdir = _NOWHERE  # torch asks for the folder, which Python would look for by writing files
    tasks = VisionTasks(threads)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(HEAD.size)) == HEAD.size:
        _allow_cpu(seconds * threads)
        length, size = head_of(head)
        asked = json.loads(source.read(length))
        body, pixels = tasks.answer(asked, source.read(size))
        target.write(packed(body, len(pixels)))
        target.write(pixels)
        target.flush()


def limit_process(memory: int) -> None:
    """Allow `memory` bytes of address space beyond what is used now, few files, and none written.

    If the machine has no memory left, the kernel ends this process before the server.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with Path("/proc/self/statm").open() as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    for kind, limit in (
        (resource.RLIMIT_AS, used + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _MOST_FILES),
    ):
        hard = resource.getrlimit(kind)[1]
        lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lower, lower))


def _allow_cpu(seconds: int) -> None:
    """Allow `seconds` of CPU time beyond what was used so far; after that the kernel kills the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))


if __name__ == "__main__":
    main()
