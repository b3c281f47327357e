"""Our agent against the published Python agent, on the same machine, in one interleaved run.

Usage: bench_agent.py [--out FILE] [--rounds N] [--kernels N ...] [--idle SECONDS] [--standalone]

Both get the same configuration, engine, stores and load (`rpc-load`, our own generator). Each figure is taken of both agents
in turn, several times; `ratios` has ours divided by the Python agent's, medians over the rounds, and `floor` the same figures of a server
that does nothing but answer (`rpc-load bare`): the price of the sockets. The CPU of an agent is that of
all its processes. Idle CPU is agent and engine together, less the engine alone with the same containers.
"""

import argparse
import asyncio
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import uuid

sys.dont_write_bytecode = True

from ai.backend.common.docker import ImageRef
from ai.backend.common.types import AgentId, KernelId
from ai.backend.manager.clients.agent.client import AgentClient

from compat import enter
from node_peer import cache_for, creation_config
from stack import engine as engines
from stack.agents import Agent
from stack.manager import System
from stack.place import Place, command

KINDS = ("ours", "python")
TICKS = os.sysconf("SC_CLK_TCK")
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


def cpu(found):
    return sum(int(fields[11]) + int(fields[12]) for _pid, _name, fields in found) / TICKS


def rss(found):
    return sum(int(fields[21]) for _pid, _name, fields in found) * PAGE


def engine_processes():
    return [item for item in processes() if item[1] in ("dockerd", "containerd")]


def listened_on():
    """TCP ports that somebody of this network namespace listens on. Not by /proc/net/tcp, which goes through the thousands of
    connections that the calls have left, too."""
    return {int(row.split()[3].rsplit(":", 1)[1]) for row in command(["ss", "-Hltn"]).splitlines()}


class Bench:
    def __init__(self, system, options):
        self.system, self.options = system, options
        target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or engines.ROOT / "target")
        self.load = target / "release/rpc-load"
        self.agents = {}
        for kind in KINDS:
            self.agents[kind] = Agent(system, kind, port_count=600, programs=target / "release", standalone=options.standalone)
        self.raw = {kind: {} for kind in KINDS}

    def keep(self, kind, name, value):
        self.raw[kind].setdefault(name, []).append(value)

    def generate(self, agent, *words):
        return json.loads(command([self.load, f"127.0.0.1:{agent.rpc_port}", *words], limit=300))

    def floor(self):
        """The calls once more, against a server that has the answer ready."""
        raw = self.raw.setdefault("bare", {})
        server = subprocess.Popen([self.load, "127.0.0.1:0", "bare"], stdout=subprocess.PIPE, text=True)
        try:
            port = server.stdout.readline().strip()
            used = lambda: cpu([item for item in processes() if item[0] == server.pid])
            call = lambda *words: json.loads(command([self.load, f"127.0.0.1:{port}", *words], limit=300))
            call("calls", 1, 1)
            before, done = used(), call("calls", 16, 5)
            raw.setdefault("calls_per_s_16", []).append(done["count"] / done["seconds"])
            raw.setdefault("cpu_per_call_us", []).append((used() - before) / done["count"] * 1e6)
            before, done = used(), call("calls", 1, 3)
            raw.setdefault("rtt_us", []).append(done["samples_us"])
            raw.setdefault("cpu_per_call_1_us", []).append((used() - before) / done["count"] * 1e6)
            raw.setdefault("connect_and_ping_us", []).append(call("connects", 200)["samples_us"])
        finally:
            server.kill()
            server.wait()

    def start(self, agent):
        """Up to the first answered call; seconds."""
        agent.write()
        from_ = time.monotonic()
        agent.spawn()
        self.generate(agent, "ready", 180)
        return time.monotonic() - from_

    def calls(self, kind):
        agent = self.agents[kind]
        self.keep(kind, "ready_s", self.start(agent))
        self.generate(agent, "calls", 1, 1)
        before, done = cpu(of_agent(agent)), self.generate(agent, "calls", 16, 5)
        self.keep(kind, "calls_per_s_16", done["count"] / done["seconds"])
        self.keep(kind, "cpu_per_call_us", (cpu(of_agent(agent)) - before) / done["count"] * 1e6)
        before, done = cpu(of_agent(agent)), self.generate(agent, "calls", 1, 3)
        self.keep(kind, "rtt_us", done["samples_us"])
        self.keep(kind, "cpu_per_call_1_us", (cpu(of_agent(agent)) - before) / done["count"] * 1e6)
        self.keep(kind, "connect_and_ping_us", self.generate(agent, "connects", 200)["samples_us"])
        agent.stop()

    def kernels(self, kind):
        """Memory, idle CPU and creation with kernels on the node."""
        agent = self.agents[kind]
        self.start(agent)
        client = AgentClient(cache_for(f"127.0.0.1:{agent.rpc_port}"), AgentId("i-agent"))
        made = []
        for count in self.options.kernels:
            asyncio.run(self.create(client, count - len(made), made))
            if count == self.options.kernels[0]:
                self.keep(kind, "rss_bytes", rss(of_agent(agent)))
                for _ in range(5):
                    self.beyond_engine(kind, client, made)
            time.sleep(10)
            self.keep(kind, f"with_agent_cpu_{count}", self.idle(agent))
            agent.stop()
            time.sleep(3)
            self.keep(kind, f"engine_alone_cpu_{count}", self.idle(agent))
            self.start(agent)
        agent.stop()
        self.system.engine.clear()

    def idle(self, agent):
        """Cores used while nothing is asked."""
        look = lambda: (time.monotonic(), cpu(of_agent(agent) if agent.processes else []) + cpu(engine_processes()))
        from_, before = look()
        time.sleep(self.options.idle)
        until, after = look()
        return (after - before) / (until - from_)

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

    def started_at(self, since, wanted):
        """When the engine said that a container started; nanoseconds."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            text = self.system.engine.docker("events", "--since", f"{since / 1e9:.9f}", "--until", f"{time.time():.9f}", "--filter", "event=start", "--format", "{{json .}}")
            for line in text.splitlines():
                event = json.loads(line)
                if wanted(event["Actor"]):
                    return event["timeNano"]
            time.sleep(0.1)
        raise TimeoutError("no start event")

    def beyond_engine(self, kind, client, made):
        """A creation with 32 host ports until the container has started and the last port is listened on, and create and
        start of the same container without bindings."""
        kernel, session, words = self.request(range(9100, 9129))
        before = listened_on()

        async def create():
            creation = asyncio.create_task(client.create_kernels(*words))
            from_ = time.time_ns()
            await asyncio.sleep(0.02)
            while len(listened_on() - before) < 32:
                if time.time_ns() - from_ > 60e9:
                    raise TimeoutError("32 ports are not listened on")
                await asyncio.sleep(0.005)
            served = time.time_ns()
            await creation
            return from_, served

        from_, served = asyncio.run(create())
        event = self.started_at(from_, lambda actor: kernel in actor["Attributes"].values())
        self.keep(kind, "create_to_start_ms", (event - from_) / 1e6)
        self.keep(kind, "create_to_served_ms", (max(event, served) - from_) / 1e6)
        engine = self.system.engine
        (container,) = engine.containers(f"label=ai.backend.kernel-id={kernel}")
        found = json.loads(engine.docker("inspect", container))[0]
        host = {**found["HostConfig"], "PortBindings": {}}
        body = {key: found["Config"][key] for key in ("Image", "Cmd", "Entrypoint", "Env", "WorkingDir", "Tty", "OpenStdin", "User") if key in found["Config"]}
        call = lambda path, what: command(["curl", "-sf", "--unix-socket", engine.socket, "-H", "Content-Type: application/json", "-d", json.dumps(what), f"http://engine{path}"])
        name = f"bare-{uuid.uuid4().hex[:8]}"
        from_ = time.time_ns()
        call(f"/containers/create?name={name}", {**body, "HostConfig": host})
        call(f"/containers/{name}/start", {})
        event = self.started_at(from_, lambda actor: actor["Attributes"].get("name") == name)
        self.keep(kind, "engine_create_to_start_ms", (event - from_) / 1e6)
        engine.docker("rm", "--force", name)
        asyncio.run(client.destroy_kernel(kernel, session, "user-requested"))

    CALLS = (("calls_per_s_16",) * 2, ("cpu_per_call", "cpu_per_call_us"), ("cpu_per_call_1", "cpu_per_call_1_us"), ("rtt_p50", "rtt_us"), ("connect_and_ping_p50", "connect_and_ping_us"))

    def middle(self, kind, name):
        return statistics.median([value for item in self.raw[kind][name] for value in (item if isinstance(item, list) else [item])])

    def against_python(self, kind, figures):
        have = lambda raw: all(raw in self.raw.get(one, ()) for one in (kind, "python"))
        return {name: self.middle(kind, raw) / self.middle("python", raw) for name, raw in figures if have(raw)}

    def ratios(self):
        middle = self.middle
        result = self.against_python("ours", (*self.CALLS, ("rss", "rss_bytes"), ("ready", "ready_s")))
        for count in self.options.kernels:
            own = {kind: middle(kind, f"with_agent_cpu_{count}") - middle(kind, f"engine_alone_cpu_{count}") for kind in KINDS if f"with_agent_cpu_{count}" in self.raw[kind]}
            if len(own) == 2 and own["python"] > 0:
                result[f"idle_cpu_{count}"] = max(own["ours"], 0.0) / own["python"]
        if "create_to_served_ms" in self.raw["ours"]:
            result["create_beyond_engine_32_ports_ms"] = middle("ours", "create_to_served_ms") - middle("ours", "engine_create_to_start_ms")
        return result

    def report(self, path):
        git = subprocess.run(["git", "-C", engines.ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({
            "ratios": self.ratios(),
            "floor": self.against_python("bare", self.CALLS),
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
    parser.add_argument("--idle", type=float, default=60.0)
    parser.add_argument("--standalone", action="store_true", help="ours without etcd and event bus (the Python agent has no such mode)")
    options = parser.parse_args()
    enter(__file__, sys.argv[1:])
    place = Place(os.environ["BAI_COMPAT_INSIDE"])
    try:
        bench = Bench(System(place, manager=False), options)
        for number in range(options.rounds):
            for kind in KINDS:
                bench.calls(kind)
                print(f"round {number + 1} of {options.rounds}: {kind}", flush=True)
            bench.floor()
            bench.report(options.out)
        if options.kernels:
            for kind in KINDS:
                bench.kernels(kind)
                print(f"kernels: {kind}", flush=True)
                bench.report(options.out)
        print(json.dumps({"ratios": bench.ratios(), "floor": bench.against_python("bare", bench.CALLS)}, indent=1))
    finally:
        place.close()


if __name__ == "__main__":
    main()
