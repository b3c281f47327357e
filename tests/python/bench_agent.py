"""Our agent against the published Python agent, on the same machine, in one interleaved run.

Usage: bench_agent.py [--out FILE] [--rounds N] [--kernels N ...] [--idle SECONDS] [--idle-rounds N] [--creations N] [--standalone]

Both get the same configuration, engine, stores and load (`rpc-load`, our own generator). Each figure is taken of both agents in turn:
calls, connections and starts in `--rounds` rounds, memory, creation and idle CPU in `--idle-rounds` rounds (with the default numbers of
kernels about 12 minutes each). `ratios` has the medians of ours divided by the Python agent's of the same round, `quartiles` their
quartiles, `figures` those of each agent, and `floor` the ratios of a server that does nothing but answer (`rpc-load bare`): the price of
the sockets. bench_figures.py makes them, and says which are to be refused.

CPU is that of a cgroup, in which an agent with all its processes begins, those that have ended too. Idle CPU is agent and engine (with all
that it starts, but for the containers) together in a window of `--idle` seconds, less the engine alone with the same containers in a
window beside it; which of the two comes first changes with the round. Windows below 60 s make no ratio. Creation is compared with create
and start of the same container without bindings, asked for over one connection to the engine.
"""

import argparse
import asyncio
import http.client
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
import urllib.parse
import uuid

sys.dont_write_bytecode = True

from ai.backend.common.docker import ImageRef
from ai.backend.common.types import AgentId, KernelId
from ai.backend.manager.clients.agent.client import AgentClient

import bench_figures
from name_spaces import INSIDE, enter
from node_peer import cache_for, creation_config
from stack import engine as engines
from stack.agents import Agent
from stack.manager import System
from stack.place import Place, command, listening_ports

KINDS = ("ours", "python")
PAGE = os.sysconf("SC_PAGE_SIZE")


def processes():
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                yield int(entry.name), name.partition("(")[2], rest.split()
            except OSError:
                continue


def of_agent(agent):
    sessions = {process.child.pid for process in agent.processes}
    return [(pid, name, fields) for pid, name, fields in processes() if int(fields[3]) in sessions]


def rss(found):
    return sum(int(fields[21]) for _pid, _name, fields in found) * PAGE


class EngineClient(http.client.HTTPConnection):
    """One connection to the engine that stays open."""

    def __init__(self, path):
        super().__init__("engine", timeout=60)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)

    def ask(self, method, path, what=None):
        body = None if what is None else json.dumps(what)
        self.request(method, path, body, {} if body is None else {"Content-Type": "application/json"})
        answer = self.getresponse()
        text = answer.read().decode()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text}")
        return text

    def started_at(self, since, wanted):
        """When the engine said that a container started; nanoseconds."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            until = time.time_ns()
            words = {"since": f"{since / 1e9:.9f}", "until": f"{until / 1e9:.9f}", "filters": json.dumps({"event": ["start"]})}
            # The engine ends the answer at `until`, which is over.
            for line in self.ask("GET", f"/events?{urllib.parse.urlencode(words)}").splitlines():
                event = json.loads(line)
                if wanted(event["Actor"]):
                    return event["timeNano"]
            time.sleep(0.1)
        raise TimeoutError("no start event")


def until_listened(before, count):
    """When so many more ports were listened on; nanoseconds. Blocks."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if len(listening_ports() - before) >= count:
            return time.time_ns()
        time.sleep(0.002)
    raise TimeoutError(f"{count} ports are not listened on")


class Bench:
    def __init__(self, system, options):
        self.system, self.options = system, options
        target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or engines.ROOT / "target")
        self.load = target / "release/rpc-load"
        self.agents = {}
        for kind in KINDS:
            self.agents[kind] = Agent(system, kind, port_count=600, programs=target / "release", standalone=options.standalone)
        self.raw = {kind: {} for kind in KINDS}
        place = system.place
        self.groups = {kind: place.group(kind) for kind in (*KINDS, "bare")}
        self.engine_group = place.groups["dockerd"]

    def keep(self, kind, name, value):
        self.raw[kind].setdefault(name, []).append(value)

    def generate(self, agent, *words):
        return json.loads(command([self.load, f"127.0.0.1:{agent.rpc_port}", *words], limit=300))

    def floor(self):
        """The calls once more, against a server that has the answer ready."""
        raw = self.raw.setdefault("bare", {})
        group = self.groups["bare"]
        server = subprocess.Popen(group.within([self.load, "127.0.0.1:0", "bare"]), stdout=subprocess.PIPE, text=True)
        try:
            port = server.stdout.readline().strip()
            call = lambda *words: json.loads(command([self.load, f"127.0.0.1:{port}", *words], limit=300))
            call("calls", 1, 1)
            before, done = group.cpu(), call("calls", 16, 5)
            raw.setdefault("calls_per_s_16", []).append(done["count"] / done["seconds"])
            raw.setdefault("cpu_per_call_us", []).append((group.cpu() - before) / done["count"] * 1e6)
            before, done = group.cpu(), call("calls", 1, 3)
            raw.setdefault("rtt_us", []).append(done["samples_us"])
            raw.setdefault("cpu_per_call_1_us", []).append((group.cpu() - before) / done["count"] * 1e6)
            raw.setdefault("connect_and_ping_us", []).append(call("connects", 200)["samples_us"])
        finally:
            server.kill()
            server.wait()

    def start(self, agent):
        """Up to the first answered call; seconds."""
        agent.write()
        self.system.place.groups.update(dict.fromkeys(("agent", "dataplane"), self.groups[agent.kind]))
        from_ = time.monotonic()
        agent.spawn()
        self.generate(agent, "ready", 180)
        return time.monotonic() - from_

    def calls(self, kind):
        agent, group = self.agents[kind], self.groups[kind]
        self.keep(kind, "ready_s", self.start(agent))
        self.generate(agent, "calls", 1, 1)
        before, done = group.cpu(), self.generate(agent, "calls", 16, 5)
        self.keep(kind, "calls_per_s_16", done["count"] / done["seconds"])
        self.keep(kind, "cpu_per_call_us", (group.cpu() - before) / done["count"] * 1e6)
        before, done = group.cpu(), self.generate(agent, "calls", 1, 3)
        self.keep(kind, "rtt_us", done["samples_us"])
        self.keep(kind, "cpu_per_call_1_us", (group.cpu() - before) / done["count"] * 1e6)
        self.keep(kind, "connect_and_ping_us", self.generate(agent, "connects", 200)["samples_us"])
        agent.stop()

    def kernels(self, kind, agent_first):
        """Memory, idle CPU and creation with kernels on the node. One agent's kernels are gone before the other one starts."""
        agent = self.agents[kind]
        self.start(agent)
        client = AgentClient(cache_for(f"127.0.0.1:{agent.rpc_port}"), AgentId("i-agent"))
        made = []
        for count in self.options.kernels:
            asyncio.run(self.create(client, count - len(made), made))
            if count == self.options.kernels[0]:
                self.keep(kind, "rss_bytes", rss(of_agent(agent)))
                for _ in range(self.options.creations):
                    self.beyond_engine(kind, client)
            else:
                self.keep(kind, f"rss_bytes_{count}", rss(of_agent(agent)))
            if agent_first:
                self.idle(agent, count)
            agent.stop()
            self.idle(agent, count)
            if not agent_first or count != self.options.kernels[-1]:
                self.start(agent)
            if not agent_first:
                self.idle(agent, count)
        agent.stop()
        self.system.engine.clear()

    def idle(self, agent, count):
        """Cores used while nothing is asked."""
        if not self.options.idle:
            return
        groups = [self.engine_group, *([self.groups[agent.kind]] if agent.processes else [])]
        look = lambda: (time.monotonic(), sum(group.cpu() for group in groups))
        # What was done before comes to rest.
        time.sleep(10)
        from_, before = look()
        time.sleep(self.options.idle)
        until, after = look()
        self.keep(agent.kind, f"{'with_agent' if agent.processes else 'engine_alone'}_cpu_{count}", (after - before) / (until - from_))

    def request(self, ports=()):
        image = json.loads(self.system.engine.docker("image", "inspect", engines.APP))[0]
        record = {"canonical": engines.APP, "digest": image["Id"], "architecture": os.uname().machine, "labels": image["Config"]["Labels"]}
        kernel, session = str(uuid.uuid4()), str(uuid.uuid4())
        config = creation_config(record, kernel, session)
        config["image"]["project"] = "stable"
        config["resource_slots"] = {"cpu": "0.02", "mem": str(64 << 20)}
        config["preopen_ports"] = list(ports)
        reference = ImageRef.from_image_str(engines.APP, "stable", "local", architecture=record["architecture"], is_local=True)
        cluster = {"mode": "SINGLE_NODE", "size": 1, "replicas": {"main": 1}, "network_config": {}, "ssh_keypair": None, "cluster_ssh_port_mapping": None}
        return kernel, session, (session, [kernel], [config], cluster, {KernelId(uuid.UUID(kernel)): reference})

    async def create(self, client, count, made):
        gate = asyncio.Semaphore(4)

        async def one():
            kernel, session, words = self.request()
            async with gate:
                await client.create_kernels(*words)
            made.append((kernel, session))

        await asyncio.gather(*(one() for _ in range(count)))

    def beyond_engine(self, kind, client):
        """A creation with 32 host ports until the container has started and the last port is listened on, and create and
        start of the same container without bindings. Neither starts a program of the bench's while its clock runs."""
        kernel, session, words = self.request(range(9100, 9129))
        before = listening_ports()
        engine = self.system.engine
        client_of_engine = EngineClient(engine.socket)
        client_of_engine.ask("GET", "/_ping")

        async def create():
            served = asyncio.get_running_loop().run_in_executor(None, until_listened, before, 32)
            from_ = time.time_ns()
            await client.create_kernels(*words)
            return from_, await served

        from_, served = asyncio.run(create())
        event = client_of_engine.started_at(from_, lambda actor: kernel in actor["Attributes"].values())
        self.keep(kind, "create_to_start_ms", (event - from_) / 1e6)
        self.keep(kind, "create_to_served_ms", (max(event, served) - from_) / 1e6)
        (container,) = engine.containers(f"label=ai.backend.kernel-id={kernel}")
        found = json.loads(engine.docker("inspect", container))[0]
        host = {**found["HostConfig"], "PortBindings": {}}
        body = {key: found["Config"][key] for key in ("Image", "Cmd", "Entrypoint", "Env", "WorkingDir", "Tty", "OpenStdin", "User") if key in found["Config"]}
        name = f"bare-{uuid.uuid4().hex[:8]}"
        from_ = time.time_ns()
        client_of_engine.ask("POST", f"/containers/create?name={name}", {**body, "HostConfig": host})
        client_of_engine.ask("POST", f"/containers/{name}/start")
        event = client_of_engine.started_at(from_, lambda actor: actor["Attributes"].get("name") == name)
        self.keep(kind, "engine_create_to_start_ms", (event - from_) / 1e6)
        client_of_engine.close()
        engine.docker("rm", "--force", name)
        asyncio.run(client.destroy_kernel(kernel, session, "user-requested"))

    def figures(self):
        return bench_figures.report(self.raw, self.options.kernels, self.options.idle)

    def report(self, path):
        git = subprocess.run(["git", "-C", engines.ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({
            **self.figures(),
            "versions": {
                "python agent": "25.15.8", "ours": git, "kernel": platform.release(), "python": platform.python_version(),
                "engine": self.system.engine.docker("version", "--format", "{{.Server.Version}}").strip(),
            },
            "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()},
            "options": vars(self.options) | {"out": str(path)},
            "raw": self.raw,
        }, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("target/bench/agent.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", type=int, nargs="*", default=[10, 50])
    parser.add_argument("--idle", type=float, default=60.0, metavar="SECONDS", help="one window; 0 leaves idle CPU out")
    parser.add_argument("--idle-rounds", type=int, default=3, help="rounds of memory, creation and idle CPU")
    parser.add_argument("--creations", type=int, default=3, help="creations with 32 ports in each of these")
    parser.add_argument("--standalone", action="store_true", help="ours without etcd and event bus (the Python agent has no such mode)")
    options = parser.parse_args()
    enter(__file__, sys.argv[1:], prepare=lambda: engines.have_images(Place))
    place = Place(os.environ[INSIDE])
    try:
        place.groups["dockerd"] = place.group("engine")
        bench = Bench(System(place, manager=False), options)
        for number in range(options.rounds):
            for kind in KINDS:
                bench.calls(kind)
                print(f"round {number + 1} of {options.rounds}: {kind}", flush=True)
            bench.floor()
            bench.report(options.out)
        for number in range(options.idle_rounds if options.kernels else 0):
            # So that a change of the machine in the course of a round favours neither.
            even = number % 2 == 0
            for kind in KINDS if even else reversed(KINDS):
                bench.kernels(kind, agent_first=even)
                print(f"kernels, round {number + 1} of {options.idle_rounds}: {kind}", flush=True)
            bench.report(options.out)
        found = bench.figures()
        print(json.dumps({name: found[name] for name in ("ratios", "quartiles", "floor", "notes", "problems")}, indent=1))
    finally:
        place.close()
    if found["problems"]:
        sys.exit("\n".join(found["problems"]))


if __name__ == "__main__":
    main()
