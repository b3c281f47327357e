"""The temporary directory of one run, its processes and its ports."""

import asyncio
import contextlib
import os
import pathlib
import random
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time


class Failed(Exception):
    """Something of the system did not come up; the text ends with the last lines of its log."""


class Process:
    def __init__(self, name, child, log):
        self.name, self.child, self.log = name, child, log

    def running(self):
        return self.child.poll() is None

    def last_words(self, lines=30):
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self, first=signal.SIGTERM, limit=20):
        """Ends the process, then whatever of its session is left."""
        if self.running():
            self.child.send_signal(first)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(limit)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait(10)


class Group:
    """A cgroup: its CPU time is that of all processes that were begun within it, those that have ended too."""

    def __init__(self, name):
        self.path, self.file = self.find(name)
        self.path.mkdir()

    @staticmethod
    def find(name):
        for mount in ("cpuacct", "cpu,cpuacct", "cpuacct,cpu"):
            top = pathlib.Path("/sys/fs/cgroup", mount)
            if (top / "cpuacct.usage").exists():
                return top / name, "cpuacct.usage"
        return pathlib.Path("/sys/fs/cgroup", name), "cpu.stat"

    def within(self, argv):
        """The command line that runs a program in here."""
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', self.path / "cgroup.procs", *argv]

    def cpu(self):
        """Seconds, to the nanosecond or microsecond."""
        text = (self.path / self.file).read_text()
        if self.file == "cpuacct.usage":
            return int(text) / 1e9
        return int(text.split("usage_usec ")[1].split()[0]) / 1e6


class Place:
    def __init__(self, token=None, keep=False):
        # The second is on tmpfs, for regions.
        self.directory, self.memory = self.paths(token or secrets.token_hex(4))
        self.directory.mkdir(mode=0o755)
        self.memory.mkdir(mode=0o700)
        self.keep = keep
        self.processes = []
        self.undo = []
        # By name of a process; who is not named is in its parent's.
        self.groups = {}
        self._made = []
        self._ports = set()
        (self.directory / "log").mkdir()

    @staticmethod
    def paths(token):
        return [pathlib.Path(base, f"bai-compat.{token}") for base in (tempfile.gettempdir(), "/dev/shm")]

    @classmethod
    def remove(cls, token):
        for path in cls.paths(token):
            shutil.rmtree(path, ignore_errors=True)
        for name in cls.group_names(cls.paths(token)[0]):
            with contextlib.suppress(OSError):
                Group.find(name)[0].rmdir()

    @staticmethod
    def group_names(directory):
        top = Group.find(directory.name)[0]
        return [found.name for found in top.parent.glob(f"{top.name}.*")]

    def group(self, name):
        """A new cgroup; it goes with this place."""
        self._made.append(Group(f"{self.directory.name}.{name}"))
        return self._made[-1]

    def folder(self, name):
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def ports(self, count):
        """A block of consecutive ports nobody listens on, below the ephemeral ones."""
        for _ in range(1000):
            first = random.randrange(21_000, 32_000 - count)
            block = range(first, first + count)
            if self._ports.isdisjoint(block) and all(map(_free, block)):
                self._ports.update(block)
                return first
        raise Failed(f"no free block of {count} ports")

    def port(self):
        return self.ports(1)

    def spawn(self, name, argv, *, env=None, cwd=None):
        if name in self.groups:
            argv = self.groups[name].within(argv)
        log = self.directory / "log" / f"{name}.log"
        with open(log, "ab") as out:
            child = subprocess.Popen(
                [str(item) for item in argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(env or {})},
                cwd=cwd or self.directory,
                start_new_session=True,
            )
        process = Process(name, child, log)
        self.processes.append(process)
        return process

    def stop(self, process, first=signal.SIGTERM, limit=20):
        process.stop(first, limit)
        if process in self.processes:
            self.processes.remove(process)

    def close(self):
        """Stops and removes everything; a step that fails does not keep the others from their turn."""
        for undo in reversed(self.undo):
            with contextlib.suppress(Exception):
                undo()
        for process in reversed(self.processes[:]):
            with contextlib.suppress(Exception):
                self.stop(process)
        for group in self._made:
            with contextlib.suppress(Failed):
                wait("the group is empty", lambda: _removed(group.path), 5)
        shutil.rmtree(self.memory, ignore_errors=True)
        if self.keep:
            print(f"kept: {self.directory}")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)


def _free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _removed(path):
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


def listening_ports():
    """TCP ports that somebody of this network namespace listens on, by sock_diag(7). Not by /proc/net/tcp, which goes through the
    thousands of connections that others have left, too, and by no other program: starting one takes longer than the question."""
    by_family, dump, listen, done, error = 20, 0x301, 1 << 10, 3, 2
    ports = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as asked:
        for family in (socket.AF_INET, socket.AF_INET6):
            asked.sendall(struct.pack("=IHHII BBBBI 48x", 72, by_family, dump, 0, 0, family, socket.IPPROTO_TCP, 0, 0, listen))
            answered = False
            while not answered:
                data = asked.recv(1 << 17)
                while len(data) >= 16:
                    length, kind = struct.unpack_from("=IH", data)
                    if kind == error:
                        raise OSError(-struct.unpack_from("=i", data, 16)[0], "sock_diag")
                    if kind == done:
                        answered = True
                        break
                    ports.add(struct.unpack_from(">H", data, 20)[0])
                    data = data[(length + 3) & ~3:]
    return ports


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
        return True
    return False


def wait(what, condition, limit, process=None):
    """Blocks until `condition` holds; names what was waited for, and its process's last words, when it does not."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        if process and not process.running():
            raise Failed(f"{process.name} ended with {process.child.returncode}:\n{process.last_words()}")
        time.sleep(0.1)
    raise Failed(f"{what}: not within {limit} s\n{process.last_words() if process else ''}")


async def eventually(what, condition, limit, every=0.3):
    """The same for coroutines; what the last try raised or returned is told."""
    end = time.monotonic() + limit
    last = None
    while time.monotonic() < end:
        try:
            result = await condition()
            if result:
                return result
            last = result
        except Exception as error:
            last = error
        await asyncio.sleep(every)
    raise TimeoutError(f"{what}: not within {limit} s; last: {last!r:.500}")


def command(argv, *, env=None, cwd=None, limit=120, check=True):
    done = subprocess.run(
        [str(item) for item in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
        cwd=cwd,
        timeout=limit,
    )
    if check and done.returncode:
        raise Failed(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout
