"""One picture by stable-diffusion.cpp, through stable-diffusion-cpp-python; prints seconds and memory as JSON.

python sd_cpp.py FILE TYPE THREADS SIDE STEPS GUIDANCE
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from stable_diffusion_cpp import StableDiffusion


def main() -> None:
    """Load, draw, and report."""
    file, kind, threads, side, steps, guidance = sys.argv[1:]
    began = time.perf_counter()
    model = StableDiffusion(model_path=file, wtype=kind, n_threads=int(threads), verbose=False)
    loaded = time.perf_counter()
    marks: list[float] = []
    model.generate_image(
        prompt="a red circle on a blue background",
        width=int(side),
        height=int(side),
        cfg_scale=float(guidance),
        sample_method="euler",
        sample_steps=int(steps),
        seed=1,
        progress_callback=lambda step, total, seconds: (
            marks.append(time.perf_counter()) if total == int(steps) else None
        ),
    )
    ended = time.perf_counter()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    spans = [after - before for before, after in itertools.pairwise(marks)]
    facts = {"load": loaded - began, "whole": ended - loaded, "steps": spans, "peak": int(peak.split()[1]) * 1024}
    sys.stdout.write(f"\n{json.dumps(facts)}\n")


if __name__ == "__main__":
    main()
