"""Measures a scan of 500 model files: first, with the list of before, and without anything but JSON.

`python benchmarks/model_scan.py [--files 500] [--out FILE]`: writes sparse files with the headers of real models into a
temporary folder: all kinds mixed, then SDXL checkpoints only, whose headers are the longest. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]

from model_files import FILES, write_safetensors  # noqa: E402  # found only by the path above

from stable_diffusion_server.pipelines import ModelLibrary  # noqa: E402  # the same

# The library keeps no identity of a file that changed within the last two seconds.
_OLD = 1_700_000_000


def written(folder: Path, files: int, kinds: list[str]) -> int:
    """Write files of these kinds in turn; returns the bytes of their headers."""
    headers = 0
    for number in range(files):
        file = write_safetensors(folder / f"{number}.safetensors", FILES[kinds[number % len(kinds)]])
        os.utime(file, (_OLD, _OLD))
        with file.open("rb") as source:
            headers += int.from_bytes(source.read(8), "little")
    return headers


def parse_all(folder: Path) -> None:
    """Read each header and parse its JSON, nothing else."""
    for file in folder.iterdir():
        with file.open("rb") as source:
            json.loads(source.read(int.from_bytes(source.read(8), "little")))


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and elapsed seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def rows(files: int) -> list[str]:
    """The table, line by line."""
    lines = ["| folder | headers | what | CPU s | elapsed s |", "| --- | --- | --- | --- | --- |"]
    for title, kinds in (("all kinds mixed", list(FILES)), ("SDXL checkpoints", ["sdxl"])):
        with tempfile.TemporaryDirectory() as place:
            folder, cache = Path(place, "models"), Path(place, "library.json")
            headers = written(folder, files, kinds)
            time.sleep(2.5)  # ctime cannot be set: let the files grow old enough to be kept
            library = ModelLibrary((folder,), cache)
            for what, work in (
                ("JSON alone", partial(parse_all, folder)),
                ("first scan", library.refresh),
                ("scan with the list of before", library.refresh),
            ):
                cpu, wall = seconds_of(work)
                lines.append(f"| {files} {title} | {headers / 1e6:.0f} MB | {what} | {cpu:.2f} | {wall:.2f} |")
    return lines


def main() -> None:
    """Print the table; with `--out` also write it, with the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    table = "\n".join(rows(options.files))
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load {load:.1f} before, Python {platform.python_version()}"
    text = (
        f"# Scan of model files\n\n`python benchmarks/model_scan.py --files {options.files}`: {machine}.\n\n{table}\n"
    )
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
