"""Reads what an agent left in a Redis with the published classes of the manager's side, and prints it as JSON.

Usage: event_reader.py PORT CONTAINER_ID HEARD

HEARD is a file with what the channel brought, a message per line.
"""

import importlib
import json
import pkgutil
import sys
import zlib

import redis
from ai.backend.common import msgpack
from ai.backend.common.events import event_types
from ai.backend.common.events.types import AbstractAnycastEvent, AbstractBroadcastEvent
from ai.backend.common.json import load_json
from ai.backend.common.log.types import ContainerLogData
from ai.backend.common.message_queue.types import MessagePayload


def classes(base):
    """The event classes below a base, by the name on the bus."""
    found = {}
    for subclass in base.__subclasses__():
        found.update(classes(subclass))
        try:
            found[subclass.event_name()] = subclass
        except (NotImplementedError, TypeError):
            pass
    return found


def plain(value):
    """JSON for the types that the decoder makes, telling a Decimal from a text."""
    kind = type(value).__name__
    if kind in ("Decimal", "UUID"):
        return {kind: str(value)}
    if hasattr(value, "model_dump"):
        # Not model_dump itself: it would write the slots anew.
        return {key: plain(getattr(value, key)) for key in type(value).model_fields}
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if hasattr(value, "value"):
        return value.value
    if kind == "QuotaScopeID":
        return str(value)
    if hasattr(value, "__dict__"):
        return {key: plain(item) for key, item in vars(value).items()}
    return value


def read(payload, known):
    event = known[payload.name].deserialize(tuple(payload.args))
    result = {"name": payload.name, "source": payload.source, "event": plain(event)}
    if payload.metadata.request_id is not None or payload.metadata.user is not None:
        raise SystemExit(f"metadata of {payload.name}: {payload.metadata}")
    if payload.name == "agent_heartbeat":
        info = event.agent_info
        result["slots_type"] = type(info.available_resource_slots).__name__
        result["images"] = plain(msgpack.unpackb(zlib.decompress(info.images)))
    return result


def main():
    port, container = int(sys.argv[1]), sys.argv[2]
    with open(sys.argv[3], encoding="utf-8") as file:
        messages = file.read().splitlines()
    for module in pkgutil.walk_packages(event_types.__path__, event_types.__name__ + "."):
        importlib.import_module(module.name)
    anycasts, broadcasts = classes(AbstractAnycastEvent), classes(AbstractBroadcastEvent)
    stream = redis.Redis(port=port, db=4)
    entries = [
        read(MessagePayload.from_anycast(fields), anycasts)
        for _, fields in stream.xrange("events")
    ]
    heard = [read(MessagePayload.from_broadcast(load_json(text)), broadcasts) for text in messages]
    cached = [
        read(MessagePayload.from_broadcast(load_json(stream.get(key))), broadcasts)
        for key in sorted(stream.keys("bgtask.*"))
    ]
    logs = redis.Redis(port=port, db=6)
    log = b"".join(
        ContainerLogData.deserialize(element).get_content()
        for element in logs.lrange(f"containerlog.{container}", 0, -1)
    )
    print(json.dumps({"entries": entries, "heard": heard, "cached": cached, "log": log.decode()}))


main()
