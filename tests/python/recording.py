"""What an agent leaves on the bus, in etcd and in Redis, reduced to names and types.

A recording is a flat map: where a value lies -> its type. Identifiers, numbers as keys, and device paths are made equal, so
that recordings of two agents on two machines can be compared.
"""

import asyncio
import base64
import collections
import contextlib
import json
import re

import msgpack
import redis.asyncio

STATISTICS, STREAM, LOGS = 0, 4, 6
PERIODIC = {"agent_heartbeat", "agent_status_heartbeat", "agent_started", "agent_error", "agent_images_remove"}
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


class Recorder:
    def __init__(self, system, agent_id):
        self.system, self.agent_id = system, agent_id
        self.types = collections.defaultdict(set)
        self.order = []
        self.tasks = []

    def _redis(self, database):
        return redis.asyncio.Redis(host="127.0.0.1", port=self.system.redis.port, db=database)

    async def start(self):
        self.bus = self._redis(STREAM)
        self.channel = self.bus.pubsub(ignore_subscribe_messages=True)
        await self.channel.subscribe("events_all")
        self.tasks = [asyncio.create_task(self._stream()), asyncio.create_task(self._broadcasts())]

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
            for _name, entries in await self.bus.xread({"events": last}, count=64):
                for last, fields in entries:
                    if fields[b"source"].decode() == self.agent_id:
                        name = fields[b"name"].decode()
                        for field in fields:
                            self.types[f"stream fields/{field.decode()}"].add("bytes")
                        args = unpack(fields[b"args"])
                        # Its lists are empty or not, as the time may be.
                        self.note(f"anycast {name}", args[:1] if name == "agent_status_heartbeat" else args)
                        if name not in PERIODIC:
                            self.order.append(name)
            await asyncio.sleep(0.2)

    async def _broadcasts(self):
        while True:
            message = await self.channel.get_message(timeout=1)
            if message:
                content = json.loads(message["data"])
                if content["source"] == self.agent_id:
                    for field in content:
                        self.types[f"broadcast members/{field}"].add(type(content[field]).__name__)
                    self.note(f"broadcast {content['name']}", unpack(base64.b64decode(content["args"])))

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

    def recording(self):
        # What happens to one session, each step at its first time.
        steps = list(dict.fromkeys(self.order))
        return {"steps": steps, "types": {path: "|".join(sorted(kinds)) for path, kinds in sorted(self.types.items())}}


def differences(reference, found):
    """One line for each place where they differ. Fewer types in one place are no difference: a value that may be absent."""
    lines = []
    if reference["steps"] != found["steps"]:
        lines.append(f"steps: {' '.join(reference['steps'])} -> {' '.join(found['steps'])}")
    before, after = reference["types"], found["types"]
    for path in sorted(before.keys() | after.keys()):
        ours, theirs = after.get(path, "absent").split("|"), before.get(path, "absent").split("|")
        if not set(ours) <= set(theirs):
            lines.append(f"{path}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}")
    return lines
