"""What an agent leaves on the bus, in etcd and in Redis, reduced to what recordings of two agents on two machines share.

`types` is a flat map: where a value lies -> its type; identifiers, numbers as keys, and device paths are made equal.
`scenarios` has what happened in the life of each session and of the agent, in order: the events of each kernel (those of no
kernel are in every sequence) on the stream and on the channel, and what was written to the node's keys in etcd. A line that
begins with `--` is what was asked for at this point.
"""

import asyncio
import base64
import collections
import contextlib
import difflib
import json
import re

import msgpack
import redis.asyncio

from stack.place import answers

STATISTICS, STREAM, LOGS = 0, 4, 6
# Told by time, or whenever something is wrong: no step of a session.
REPORTS = ("agent_heartbeat", "agent_status_heartbeat")
TROUBLES = ("agent_error", "agent_images_remove")
# How often they come after one order is a matter of time: of polls, or of how often the manager asks again.
REPEATED = ("bgtask_", "execution_", "image_pull_")
# The same of the end of a kernel, one right after the other.
ENDS = "kernel_terminated"
# What it reports is a matter of time.
BARE = "bgtask_updated"
# They end with words for people, and perhaps the image.
WORDED = ("image_pull_failed", "bgtask_failed")
START, STOP = "agent start", "agent stop"
# Scenarios and their last step: what follows is a matter of how soon the manager tries again.
UNTIL = {"broken": "kernel_creating"}
# Keys of the manager and the storage proxy.
MANAGERS = r"^(kp:|service_discovery\.(manager|storage))"
NAMES = [
    (re.compile(r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"), "UUID"),
    (re.compile(r"^[0-9a-f]{64}$"), "CONTAINER"),
    (re.compile(r"^\d+$"), "N"),
    (re.compile(r"^/.*"), "PATH"),
]


def generic(key, agent_id):
    key = str(key).replace(agent_id, "AGENT")
    for pattern, word in NAMES:
        if pattern.match(key):
            return word
    return re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID", re.sub(r"[0-9a-f]{64}", "CONTAINER", key))


def unpack(data):
    return msgpack.unpackb(data, ext_hook=lambda code, _data: msgpack.ExtType(code, b""), strict_map_key=False)


def shown(name, args, agent_id):
    """An event with those of its arguments that say something: no identifiers, times and maps."""
    words = [name]
    args = [] if name == BARE else args
    if name in WORDED:
        args = [*args[:-1], "REASON"] if isinstance(args[-1], str) else [*args[:-2], "REASON"]
    for value in args:
        if isinstance(value, str):
            text = re.sub(r"127\.0\.0\.1:\d+", "REGISTRY", generic(value, agent_id))
            words += [text] if text and text not in ("UUID", "CONTAINER", "AGENT") else []
        elif isinstance(value, int):
            words.append(str(value))
        elif isinstance(value, msgpack.ExtType) and value.code == 6:
            # A pickled enum; its value is its last text.
            words.append(re.findall(rb"[a-z][a-z-]+(?=[^a-z-]*$)", value.data)[-1].decode())
    return " ".join(words)


class Recorder:
    def __init__(self, system, agent):
        self.system, self.agent, self.agent_id = system, agent, agent.id
        self.types = collections.defaultdict(set)
        # (carrier, scenario, identifiers, step) of each event; the scenario is the one under way.
        self.events = []
        self.sessions = {}
        self.scenario = START
        self.revisions = {START: [1, None]}
        self.tasks = []

    def _redis(self, database):
        return redis.asyncio.Redis(host="127.0.0.1", port=self.system.redis.port, db=database)

    async def start(self):
        self.bus = self._redis(STREAM)
        self.channel = self.bus.pubsub(ignore_subscribe_messages=True)
        await self.channel.subscribe("events_all")
        self.tasks = [asyncio.create_task(self._stream()), asyncio.create_task(self._broadcasts())]

    async def enter(self, scenario, session=None):
        """What comes from now on and names no other session belongs to this one."""
        if session:
            self.sessions[str(session)] = scenario
        if scenario != self.scenario:
            revision = await asyncio.to_thread(self.system.etcd.revision)
            self.revisions[self.scenario][1] = revision
            self.revisions.setdefault(scenario, [revision + 1, None])
            self.scenario = scenario

    async def asked(self, what, scenario=None):
        """Notes what the scenario is asked for now; what came before has time to arrive."""
        await asyncio.sleep(1)
        for carrier in ("stream", "channel"):
            self.events.append((carrier, scenario or self.scenario, (), f"-- {what}"))

    def seen(self, scenario, name):
        """How often an event came on the stream."""
        return sum(1 for carrier, of, _ids, step in self._steps() if (carrier, of) == ("stream", scenario) and step.split()[0] == name)

    async def stop(self):
        for task in self.tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.tasks = []
        await self.channel.aclose() if hasattr(self.channel, "aclose") else await self.channel.close()

    async def _stream(self):
        """The stream keeps some 128 entries only, so it is read all along."""
        last = "0"
        while True:
            for _name, entries in await self.bus.xread({"events": last}, count=64, block=1000):
                for last, fields in entries:
                    if fields[b"source"].decode() == self.agent_id:
                        name = fields[b"name"].decode()
                        for field in fields:
                            self.types[f"stream fields/{field.decode()}"].add("bytes")
                        args = unpack(fields[b"args"])
                        # Its lists are empty or not, as the time may be.
                        self.note(f"anycast {name}", args[:1] if name == "agent_status_heartbeat" else args)
                        self._step("stream", name, fields[b"args"])

    async def _broadcasts(self):
        while True:
            message = await self.channel.get_message(timeout=1)
            if message:
                content = json.loads(message["data"])
                if content["source"] == self.agent_id:
                    for field in content:
                        self.types[f"broadcast members/{field}"].add(type(content[field]).__name__)
                    data = base64.b64decode(content["args"])
                    self.note(f"broadcast {content['name']}", unpack(data))
                    self._step("channel", content["name"], data)

    def _step(self, carrier, name, data):
        args = msgpack.unpackb(data, strict_map_key=False)
        step = shown(name, args, self.agent_id)
        if self.scenario == START and name in REPORTS:
            # At their first time.
            if any(event[3] == step for event in self.events):
                return
        elif name in (*REPORTS, *TROUBLES):
            return
        if name == "agent_started":
            step += f" (answers calls: {'yes' if answers(self.agent.rpc_port) else 'not yet'})"
        ids = tuple(value for value in args if isinstance(value, str) and generic(value, self.agent_id) == "UUID")
        self.events.append((carrier, self.scenario, ids, step))

    def _steps(self):
        """The events with their scenarios, as far as their identifiers tell."""
        kernels = {}
        for carrier, scenario, ids, step in self.events:
            for session in ids:
                if session in self.sessions:
                    scenario = self.sessions[session]
                    kernels.update({other: scenario for other in ids if other != session})
            yield carrier, next((kernels[item] for item in ids if item in kernels), scenario), ids, step

    def note(self, path, value):
        if isinstance(value, dict):
            if not value:
                self.types[path].add("map")
            for key, item in value.items():
                self.note(f"{path}/{generic(key, self.agent_id)}", item)
        elif isinstance(value, (list, tuple)) and not isinstance(value, msgpack.ExtType):
            if not value:
                self.types[path].add("list")
            top = re.match(r"^(anycast|broadcast) \w+$", path)
            for index, item in enumerate(value):
                self.note(f"{path}/{index if top else '[]'}", item)
        elif isinstance(value, msgpack.ExtType):
            self.types[path].add(f"ext {value.code}")
        else:
            self.types[path].add("nil" if value is None else type(value).__name__)

    async def leavings(self):
        """Keys in etcd and Redis."""
        for key, value in (await asyncio.to_thread(self.system.etcd.keys, "nodes/agents/")).items():
            shown = "port" if key.endswith("_port") and value.isdigit() else value
            self.types[f"etcd {generic(key, self.agent_id)}"].add(shown)
        for database in (STATISTICS, STREAM, LOGS):
            store = self._redis(database)
            for raw in sorted(await store.keys("*")):
                key = raw.decode()
                name = generic(key, self.agent_id)
                if database == STREAM and not key.startswith("bgtask.") or re.match(MANAGERS, key):
                    continue
                if re.match(r"^image:", name):
                    name = "image:ID:distro"
                kind = (await store.type(raw)).decode()
                path = f"redis {database} {name}"
                self.types[path].add(kind)
                life = await store.ttl(raw)
                self.types[f"{path} expires"].add("yes" if life >= 0 else "no")
                if kind == "hash" and key.startswith("computer"):
                    for field, text in (await store.hgetall(raw)).items():
                        self.note(f"{path}/{field.decode()}", json.loads(text))
                elif kind == "string" and database == STATISTICS:
                    with contextlib.suppress(Exception):
                        value = unpack(await store.get(raw))
                        if isinstance(value, dict):
                            self.note(path, value)
            await store.aclose() if hasattr(store, "aclose") else await store.close()

    async def recording(self, names):
        """With those of the named scenarios that took place."""
        await self.enter("the end")
        scenarios = {}
        for name in names:
            if name not in self.revisions:
                continue
            carried = {}
            for carrier in ("stream", "channel"):
                steps = [(ids, step) for kind, of, ids, step in self._steps() if (kind, of) == (carrier, name)]
                if (last := UNTIL.get(name)) in (told := [step for _ids, step in steps]):
                    steps = steps[: told.index(last) + 1]
                # A kernel's events begin with its identifier; those of sessions and tasks don't name a kernel.
                kernels = sorted({ids[0] for ids, step in steps if ids and step.startswith("kernel_")}) or [None]
                of_kernel = lambda ids, kernel: not set(ids) & (set(kernels) - {kernel})
                sequences = sorted([step for ids, step in steps if of_kernel(ids, kernel)] for kernel in kernels)
                carried[carrier] = [list(first_times(steps)) for steps in sequences]
            first, last = self.revisions.get(name, (1, 0))
            changes = await asyncio.to_thread(self.system.etcd.history, "nodes/agents/")
            carried["etcd"] = [[self._change(*change) for revision, *change in changes if first <= revision <= last]]
            scenarios[name] = carried
        return {"scenarios": scenarios, "types": {path: "|".join(sorted(kinds)) for path, kinds in sorted(self.types.items())}}

    def _change(self, kind, key, value):
        value = "port" if key.endswith("_port") and value.isdigit() else value
        return f"{kind} {generic(key, self.agent_id)} {value}".rstrip()


def first_times(steps):
    """Without what is only repeated, and without creations that the manager tried again (a machine may be too busy to start a kernel in time)."""
    created = [index for index, step in enumerate(steps) if step == "kernel_preparing"]
    if len(created) > 1:
        steps = steps[: created[0]] + steps[created[-1] :]
    told, before = set(), None
    for step in steps:
        if step.startswith("--"):
            told = set()
        # The manager may ask once more for what has just ended.
        again = step == before and step.startswith(ENDS) or step.startswith(f"{ENDS} already-terminated") and any(one.startswith(ENDS) for one in told)
        if not (again or step in told and step.startswith(REPEATED)):
            yield step
        told.add(step)
        before = step


def differences(reference, found):
    """Lines for the steps that differ, and lines for the types. Fewer types in one place are no difference: a value that may be absent."""
    steps, types = [], []
    for name, carried in found["scenarios"].items():
        for carrier, ours in carried.items():
            sequences = reference["scenarios"][name][carrier]
            place = f"{name}, {carrier}"
            if len(ours) != len(sequences):
                steps.append(f"{place}: kernels: {len(sequences)} -> {len(ours)}")
            for one, other in zip(sequences, ours):
                steps += [f"{place}: {line}" for line in difflib.ndiff(one, other) if line[:2] in ("- ", "+ ")]
    before, after = reference["types"], found["types"]
    for path in sorted(before.keys() | after.keys()):
        ours, theirs = after.get(path, "absent").split("|"), before.get(path, "absent").split("|")
        if not set(ours) <= set(theirs):
            types.append(f"{path}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}")
    return steps, types


def unexpected(reference, found, expected):
    """The differences that are not expected, and the expected steps that are missing. `expected`: see tests/vectors/compat/differences.txt."""
    steps, types = differences(reference, found)
    lines = [line for line in expected.splitlines() if line and not line.startswith("#")]
    patterns = [re.compile(".*".join(map(re.escape, line[2:].split("*")))) for line in lines if line.startswith("* ")]
    wanted = collections.Counter(line for line in lines if not line.startswith("* ") and line.split(", ")[0] in found["scenarios"])
    known = lambda line: any(pattern.fullmatch(line) for pattern in patterns)
    seen = collections.Counter(line for line in steps if not known(line))
    surplus = [*(seen - wanted).elements(), *(line for line in types if not known(line))]
    return surplus + [f"not found: {line}" for line in (wanted - seen).elements()]
