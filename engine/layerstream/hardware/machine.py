"""What this machine has to give."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import platformdirs
import psutil

_NETWORK = tuple(  # how their names begin
    "nfs cifs smb 9p ceph gluster lustre beegfs afpfs webdav davfs fuse.sshfs fuse.s3 fuse.gcs".split()
)
_CGROUP_V2 = Path("/sys/fs/cgroup")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")


def cache_folder() -> Path:
    """Where this user keeps what can be made again."""
    return Path(platformdirs.user_cache_dir("layerstream", appauthor=False))


def processor() -> str:
    """The processor's name: libraries choose kernels and block sizes by it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_memory_bytes() -> int:
    """Host memory this process may still take: what the system has free, within the process's memory cgroup."""
    available = psutil.virtual_memory().available
    limit = _cgroup_room() if sys.platform == "linux" else None
    return available if limit is None else max(0, min(available, limit))


def network_file_system(path: Path) -> str | None:
    """The kind of network file system that *path* lies on, as the system calls it; ``None``: a local one."""
    try:
        mounts = [(mount.mountpoint, mount.fstype.lower()) for mount in psutil.disk_partitions(all=True)]
    except (OSError, RuntimeError):  # a system that does not say
        return None
    resolved, innermost, kind = path.resolve(), -1, ""
    for point, its_kind in mounts:  # of two on the same folder, the later one covers the other
        if resolved.is_relative_to(point) and len(point) >= innermost:
            innermost, kind = len(point), its_kind
    return kind if kind.startswith(_NETWORK) else None


def _cgroup_room() -> int | None:
    """Bytes between the tightest memory limit of this process's cgroups and their use without page cache."""
    rooms = []
    for folder, limit_name, usage_name, cache_key in _cgroups():
        for level in [folder, *folder.parents]:
            limit, usage = _read_int(level / limit_name), _read_int(level / usage_name)
            if limit is not None and usage is not None and limit < 2**60:
                rooms.append(limit - usage + _reclaimable(level, cache_key))
    return min(rooms, default=None)


def _cgroups() -> list[tuple[Path, str, str, str]]:
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            found.append((_CGROUP_V2 / path.lstrip("/"), "memory.max", "memory.current", "file"))
        elif "memory" in controllers.split(","):
            found.append(
                (_CGROUP_V1 / path.lstrip("/"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
            )
    return found


def _reclaimable(level: Path, key: str) -> int:
    try:
        stat = (level / "memory.stat").read_text()
    except OSError:
        return 0
    fields = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    return int(fields.get(key, 0))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max", or no such file
        return None
