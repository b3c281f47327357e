"""The agent under test: ours (two programs), or the published Python agent, on the same configuration file."""

import os
import pathlib
import subprocess
import sys

from .engine import ROOT, cache
from .manager import STORAGE_SECRET
from .place import answers, command, wait

AGENT_ID = "i-compat"


def runner_directory():
    return pathlib.Path(os.environ.get("BAI_RUNNER_DIR") or cache().parent / "runner")


class Agent:
    """One node. `kind`: `ours` or `python`; `port_count` host ports; `extra`: lines for `[agent]`; `storage`: ours asks the storage proxy.

    `node`: an agent whose place this one takes, with the same ports and directories.
    """

    def __init__(self, system, kind, *, port_count=64, extra="", programs=None, standalone=False, storage=False, node=None):
        self.system, self.place, self.kind = system, system.place, kind
        self.id = AGENT_ID
        place = self.place
        target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
        self.programs = pathlib.Path(programs or os.environ.get("BAI_BIN") or target / "debug")
        self.processes = []
        self.mode = ["--standalone"] if standalone else []
        self.file = system.etc / f"agent-{kind}.toml"
        if node:
            for name in ("rpc_port", "first_port", "port_count", "watcher_port", "state", "scratch", "commits", "common"):
                setattr(self, name, getattr(node, name))
        else:
            self.choose(f"agent-{kind}", port_count, extra)
        own = f"""
[node]
run-dir = "{place.memory}"
runner-dir = "{runner_directory()}"
""" if kind == "ours" else ""
        if kind == "ours" and storage:
            secret = system.etc / "storage-proxy.secret"
            secret.touch(mode=0o600)
            secret.write_text(STORAGE_SECRET)
            own += f"""[node.storage-proxy]
url = "http://127.0.0.1:{system.storage_ports['manager']}"
secret-file = "{secret}"
interval = "2s"
"""
        self.text = self.common + own
        self.write()
        if kind == "ours":
            place.undo.append(self.detach)

    def choose(self, home, port_count, extra):
        """Ports, directories, and what both kinds are told."""
        system, place = self.system, self.place
        self.rpc_port, self.first_port, self.port_count = place.port(), place.ports(port_count), port_count
        self.watcher_port = place.port()
        self.state, self.scratch, self.commits = (place.folder(f"{home}/{name}") for name in ("state", "scratch", "commit"))
        self.common = f"""[etcd]
namespace = "{system.etcd.namespace}"
addr = {{ host = "127.0.0.1", port = {system.etcd.port} }}
[agent]
backend = "docker"
id = "{self.id}"
rpc-listen-addr = {{ host = "127.0.0.1", port = {self.rpc_port} }}
service-addr = {{ host = "127.0.0.1", port = {place.port()} }}
announce-addr = {{ host = "127.0.0.1", port = {place.port()} }}
agent-sock-port = {place.port()}
metadata-server-port = {place.port()}
aiomonitor-termui-port = {place.port()}
aiomonitor-webui-port = {place.port()}
scaling-group = "default"
region = "local"
event-loop = "uvloop"
ipc-base-path = "{place.folder(f'{home}/ipc')}"
var-base-path = "{self.state}"
mount-path = "{system.volume.parent}"
image-commit-path = "{self.commits}"
pid-file = "{self.state}/agent.pid"
cohabiting-storage-proxy = true
allow-compute-plugins = []
{extra}
[container]
port-range = [{self.first_port}, {self.first_port + port_count - 1}]
kernel-uid = 1000
kernel-gid = 1000
bind-host = "127.0.0.1"
advertised-host = "127.0.0.1"
stats-type = "docker"
sandbox-type = "docker"
scratch-type = "hostdir"
scratch-root = "{self.scratch}"
scratch-size = "1G"
[watcher]
service-addr = {{ host = "127.0.0.1", port = {self.watcher_port} }}
ssl-enabled = false
target-service = "backendai-agent.service"
soft-reset-available = false
[resource]
reserved-cpu = 0
reserved-mem = "1G"
reserved-disk = "1G"
[debug]
enabled = false
[logging]
level = "INFO"
drivers = ["console"]
[logging.pkg-ns]
"" = "WARNING"
"ai.backend" = "INFO"
[logging.console]
colored = false
format = "verbose"
"""

    def write(self):
        """Puts the configuration (back) in its place."""
        self.file.write_text(self.text)

    def start(self, limit=400):
        self.spawn()
        wait("the agent listens", lambda: answers(self.rpc_port), limit, self.processes[-1])

    def spawn(self):
        env = self.system.engine.env
        if self.kind == "python":
            argv = [[sys.executable, "-m", "ai.backend.cli", "ag", "start-server", "-f", self.file]]
        else:
            argv = [[self.programs / "bai-dataplane", *self.mode, "--config", self.file], self.control]
        names = ["agent"] if self.kind == "python" else ["dataplane", "agent"]
        self.processes = [self.place.spawn(name, words, env=env, cwd=self.state) for name, words in zip(names, argv)]

    @property
    def control(self):
        return [self.programs / "bai-agent", "run", *self.mode, "--config", self.file]

    def watcher(self, programs):
        """Ours, with other programs first in its path; to be stopped by the caller."""
        path = f"{programs}:{os.environ['PATH']}"
        return self.place.spawn("watcher", [self.programs / "bai-agent", "watcher", *self.mode, "--config", self.file], env={**self.system.engine.env, "PATH": path})

    def command(self, *words):
        """What our command line answers about this node."""
        return command([self.programs / "bai-agent", *words], env={**self.system.engine.env, "BAI_AGENT_ADDRESS": f"127.0.0.1:{self.rpc_port}"})

    @property
    def log(self):
        return "\n".join(line[:400] for line in self.processes[-1].last_words(25).splitlines()) if self.processes else ""

    def stop(self, *how, only=None):
        """`only`: one program of the two."""
        for process in reversed(self.processes[:]):
            if only in (None, process.name):
                self.place.stop(process, *how)
                self.processes.remove(process)

    def detach(self):
        """Programs in the kernel outlive ours."""
        self.stop()
        subprocess.run([self.programs / "bai-agent", "detach", "--config", self.file], capture_output=True)

    def start_control(self, limit=400):
        """Ours: the agent alone, after it was stopped alone."""
        process = self.place.spawn("agent", self.control, env=self.system.engine.env, cwd=self.state)
        self.processes.append(process)
        wait("the agent listens", lambda: answers(self.rpc_port), limit, process)
