"""The machine's memory, within the limits of the cgroups that this process belongs to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from stable_diffusion_server.pipelines.loading import host_memory
from stable_diffusion_server.pipelines.loading.host_memory import free_host_memory, total_host_memory

GB = 10**9


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup tree of files of our own, on a machine of 64 GB with 50 GB free; this process is in `a/b`."""
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    monkeypatch.setattr(host_memory, "_OWN", own)
    monkeypatch.setattr(host_memory, "_CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50 * GB, total=64 * GB))
    return tmp_path / "groups"


def limit(folder: Path, most: object, used: int, cached: int = 0) -> None:
    """Write the files of a cgroup of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used}\ninactive_file {cached}\n")


def test_without_limits_the_machine_decides(groups: Path) -> None:
    """No files, no limit (`max`), and files that hold no number."""
    assert (free_host_memory(), total_host_memory()) == (50 * GB, 64 * GB)
    limit(groups / "a" / "b", "max", 9 * GB)
    limit(groups / "a", "unlimited", 9 * GB)
    assert (free_host_memory(), total_host_memory()) == (50 * GB, 64 * GB)


@pytest.mark.parametrize("place", ["a/b", "a", "."])
def test_the_limit_of_any_group_above_counts(groups: Path, place: str) -> None:
    """In a container the limit is at the root of what is mounted; pages of files can be taken back by the kernel."""
    limit(groups / place, 12 * GB, 5 * GB, cached=2 * GB)
    assert (free_host_memory(), total_host_memory()) == (9 * GB, 12 * GB)


def test_the_smallest_room_counts_and_is_never_negative(groups: Path) -> None:
    """A child with a large limit of its own is bound by its parent; a group above its limit has nothing free."""
    limit(groups / "a" / "b", 40 * GB, GB)
    limit(groups / "a", 20 * GB, 15 * GB)
    assert (free_host_memory(), total_host_memory()) == (5 * GB, 20 * GB)
    limit(groups / "a", 20 * GB, 21 * GB)
    assert free_host_memory() == 0


def test_the_first_version_of_cgroups_counts_too(groups: Path) -> None:
    """Other names of the files, and a hierarchy of its own for memory; its `no limit` is larger than any machine."""
    host_memory._OWN.write_text("9:cpu,cpuacct:/x\n4:memory:/docker/1\nbroken\n")
    place = groups / "memory" / "docker" / "1"
    place.mkdir(parents=True)
    (place / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    (place / "memory.usage_in_bytes").write_text(str(GB))
    assert free_host_memory() == 50 * GB
    (place / "memory.limit_in_bytes").write_text(str(8 * GB))
    (place / "memory.stat").write_text("cache\ntotal_inactive_file 1000000000\n")
    assert (free_host_memory(), total_host_memory()) == (8 * GB, 8 * GB)


def test_a_machine_without_cgroups_has_no_limits(groups: Path) -> None:
    """MacOS has no such file."""
    host_memory._OWN.unlink()
    assert free_host_memory() == 50 * GB
