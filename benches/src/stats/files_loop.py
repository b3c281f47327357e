"""Reads the same numbers of containers by their files, in the way of an asyncio agent: for each container the mount table is
looked through for each controller, then the files are read and taken apart.

stdin: a line per round; stdout: its CPU and elapsed microseconds.
"""

import asyncio
import decimal
import pathlib
import resource
import sys
import time

NAMES = sys.argv[1:]


def mount_point(controller):
    unified = None
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split(" ")
        if kind == "cgroup" and controller in options.split(","):
            return pathlib.Path(place), 1
        if kind == "cgroup2":
            unified = unified or pathlib.Path(place)
    return unified, 2


def number(path):
    return int(path.read_text().strip())


def keyed(path, wanted):
    found = {}
    for line in path.read_text().splitlines():
        key, value = line.split(" ")
        if key in wanted:
            found[key] = int(value)
    return found


async def cpu(name):
    root, version = mount_point("cpuacct")
    if version == 1:
        return decimal.Decimal(number(root / name / "cpuacct.usage")) / 1_000_000
    return decimal.Decimal(keyed(root / name / "cpu.stat", {"usage_usec"})["usage_usec"]) / 1000


async def memory_and_io(name):
    root, version = mount_point("memory")
    place = root / name
    if version == 1:
        current, key = number(place / "memory.usage_in_bytes"), "total_inactive_file"
        limit = number(place / "memory.limit_in_bytes")
    else:
        current, key = number(place / "memory.current"), "inactive_file"
        limit = (place / "memory.max").read_text()
    current -= keyed(place / "memory.stat", {key}).get(key, 0)
    root, version = mount_point("blkio")
    read = written = 0
    if version == 1:
        for line in (root / name / "blkio.throttle.io_service_bytes").read_text().splitlines():
            if line.startswith("Total "):
                continue
            _, kind, count = line.split()
            read += int(count) if kind == "Read" else 0
            written += int(count) if kind == "Write" else 0
    elif (root / name / "io.stat").exists():
        for word in (root / name / "io.stat").read_text().split():
            key, _, value = word.partition("=")
            read += int(value) if key == "rbytes" else 0
            written += int(value) if key == "wbytes" else 0
    return current, limit, read, written


async def main():
    for line in sys.stdin:
        before, from_ = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        await asyncio.gather(*(cpu(name) for name in NAMES))
        found = await asyncio.gather(*(memory_and_io(name) for name in NAMES))
        assert len(found) == len(NAMES)
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{used * 1e6:.0f} {(time.monotonic() - from_) * 1e6:.0f}", flush=True)


asyncio.run(main())
