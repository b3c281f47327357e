"""Drives an agent's RPC port with the manager's own client and decoder.

Usage: rpc_peer.py keys DIR
       rpc_peer.py null ADDRESS
       rpc_peer.py curve ADDRESS AGENT_PUBLIC MANAGER_SECRET_FILE
       rpc_peer.py refused ADDRESS NULL_ADDRESS AGENT_PUBLIC MANAGER_SECRET_FILE
       rpc_peer.py conformance ADDRESS VECTOR_FILE

Prints a line per check; the exit status tells whether all passed. The agent at ADDRESS is the
test service of tests/tests/rpc_wire.rs.
"""

import asyncio
import datetime
import decimal
import json
import pathlib
import sys
import time
import uuid

import msgpack as plain_msgpack
import zmq
import zmq.asyncio
import zmq.auth
from ai.backend.common import msgpack
from ai.backend.common.auth import PublicKey, SecretKey
from ai.backend.common.docker import ImageRef, LabelName
from ai.backend.common.events.event_types.kernel.types import KernelLifecycleEventReason
from ai.backend.common.types import (
    AgentId,
    AutoPullBehavior,
    BinarySize,
    ResourceSlot,
    SessionTypes,
)
from ai.backend.manager.agent_cache import AgentRPCCache
from ai.backend.manager.clients.agent.client import AgentClient
from ai.backend.manager.exceptions import AgentError, RPCError

AGENT = AgentId("i-agent")
failed = []


def check(name, passed, detail=""):
    print(f"{'ok  ' if passed else 'FAIL'} {name} {detail if not passed else ''}".rstrip())
    if not passed:
        failed.append(name)


def cache_for(address, agent_public=None, manager_secret_file=None):
    if manager_secret_file:
        public, secret = zmq.auth.load_certificate(manager_secret_file)
    else:
        public, secret = zmq.curve_keypair()
    cache = AgentRPCCache(None, PublicKey(public), SecretKey(secret))
    cache.update(AGENT, f"tcp://{address}", PublicKey(agent_public.encode()) if agent_public else None)
    return cache


IMAGE = ImageRef("python", "stable", "3.9-ubuntu20.04", "registry.example", "x86_64", False)
VALUES = {
    "nil": None,
    "bools": [True, False],
    "ints": [0, 1, 127, 128, 255, 256, 65535, 65536, 2**31, 2**32, 2**63 - 1, 2**64 - 1],
    "negative ints": [-1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63)],
    "floats": [0.0, 2.5, -1e300, float("inf")],
    "texts": ["", "h\u00e9", "\ud55c\uae00", "x" * 31, "x" * 32, "x" * 255, "x" * 256, "x" * 65536],
    "bins": [b"", b"\x00\xff", b"y" * 255, b"y" * 256, b"y" * 65536],
    "arrays": [[], list(range(15)), list(range(16)), list(range(70000))],
    "maps": [{}, {str(i): i for i in range(15)}, {str(i): i for i in range(16)}, {str(i): i for i in range(70000)}],
    "odd keys": {1: "int", b"bin": 2, None: 3},
    "nested": {"a": [{"b": [[[{"c": None}]]]}]},
    "uuid": uuid.UUID("5d5f6a40-3d9c-4f0e-9a55-0b1c2d3e4f50"),
    "uuid keys": {uuid.uuid4(): IMAGE},
    "naive datetime": datetime.datetime(2025, 9, 8, 7, 6, 5, 123456),
    "aware datetime": datetime.datetime(2025, 9, 8, 7, 6, 5, tzinfo=datetime.timezone.utc),
    "datetime in Seoul": datetime.datetime(
        2025, 9, 8, 7, 6, 5, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=9))
    ),
    "decimals": [decimal.Decimal(text) for text in ("1", "0.25", "-12.50", "1E+3", "Infinity")],
    "paths": [pathlib.PosixPath("/home/work/data"), pathlib.PurePosixPath("rel/path")],
    "enums": [SessionTypes.BATCH, AutoPullBehavior.DIGEST, KernelLifecycleEventReason.FORCE_TERMINATED],
    "enum keys": {LabelName.CUSTOMIZED_NAME: "x"},
    "image": IMAGE,
    "local image without project": ImageRef("python", None, "latest", "registry.example", "aarch64", True),
    "slots": ResourceSlot({"cpu": decimal.Decimal(2), "mem": decimal.Decimal(1 << 30)}),
    "sizes": [BinarySize(n) for n in (0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 151 * 10**9, 2**63)],
}


async def echo_values(cache):
    for name, value in VALUES.items():
        expected = msgpack.unpackb(msgpack.packb(value))
        try:
            async with cache.rpc_context(AGENT, invoke_timeout=20) as rpc:
                got = await rpc.call.echo(value)
            check(f"echo {name}", got == expected and repr(got) == repr(expected), f"{got!r:.200} != {expected!r:.200}")
        except Exception as error:
            check(f"echo {name}", False, repr(error))


async def expect_agent_error(cache, name, call, exc_name, part):
    try:
        async with cache.rpc_context(AGENT, invoke_timeout=20) as rpc:
            got = await call(rpc.call)
        check(name, False, f"returned {got!r:.100}")
    except AgentError as error:
        passed = error.exc_name == exc_name and part in error.exc_repr
        check(name, passed, f"{error.exc_name}: {error.exc_repr}")
    except Exception as error:
        check(name, False, repr(error))


async def everyday(cache, sizes=(0, 1, 1 << 20)):
    """What must work over NULL and CURVE alike."""
    async with cache.rpc_context(AGENT, invoke_timeout=20) as rpc:
        check("ping", await rpc.call.ping("pong") == "pong")
        check("ping by name", await rpc.call.ping(msg="kw") == "kw")
    await echo_values(cache)

    payload = bytes(range(256)) * 4096
    for size in sizes:
        async with cache.rpc_context(AGENT, invoke_timeout=30) as rpc:
            sent = (payload * (size // len(payload) + 1))[:size]
            check(f"{size} bytes there and back", await rpc.call.echo(sent) == sent)

    expect = [
        ("failure", lambda call: call.fail(), "RuntimeError", "RuntimeError(\"it's broken\")"),
        ("panic", lambda call: call.boom(), "RuntimeError", "handler of boom"),
        ("unpackable result", lambda call: call.unser(), "TypeError", "result of unser"),
        ("timeout", lambda call: call.raise_timeout(), "TimeoutError", "TimeoutError()"),
        ("unknown method", lambda call: call.nosuch(), "NotImplementedError", "nosuch"),
        ("missing argument", lambda call: call.ping(), "TypeError", "missing 1 required positional argument: 'msg'"),
        ("surplus argument", lambda call: call.ping(1, 2), "TypeError", "takes 2 positional arguments but 3 were given"),
        ("unknown keyword", lambda call: call.ping("x", zzz=1), "TypeError", "unexpected keyword argument 'zzz'"),
        ("unknown kernel", lambda call: call.get_logs(str(uuid.uuid4())), "KeyError", "KeyError(UUID('"),
        ("bad uuid", lambda call: call.get_logs("x"), "ValueError", "badly formed hexadecimal UUID string"),
    ]
    for name, call, exc_name, part in expect:
        await expect_agent_error(cache, name, call, exc_name, part)


async def concurrency(cache):
    async with cache.rpc_context(AGENT, invoke_timeout=30) as rpc:
        order = []

        async def one(name, call):
            await call
            order.append(name)

        started = time.monotonic()
        await asyncio.gather(
            one("slow", rpc.call.sleep(1.0)),
            one("middle", rpc.call.sleep(0.3)),
            one("fast", rpc.call.ping("x")),
        )
        took = time.monotonic() - started
        check("replies in completion order on one connection", order == ["fast", "middle", "slow"], str(order))
        check("calls of one connection run together", took < 2.0, f"{took:.2f} s")

    async def slow_call():
        async with cache.rpc_context(AGENT, invoke_timeout=30) as rpc:
            await rpc.call.block(1.0)

    # More blocking handlers than the server has workers, all at once.
    slow = [asyncio.create_task(slow_call()) for _ in range(4)]
    await asyncio.sleep(0.3)
    context = zmq.asyncio.Context()
    address, agent_public = await cache.get_rpc_args(AGENT)
    worst = 0.0
    for _ in range(10):
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        if agent_public:
            socket.curve_serverkey = agent_public
            socket.curve_publickey = cache.manager_public_key
            socket.curve_secretkey = cache.manager_secret_key
        started = time.monotonic()
        socket.connect(address)
        await socket.send_multipart([b"PING", b"", b""])
        reply = await asyncio.wait_for(socket.recv_multipart(), 5)
        worst = max(worst, time.monotonic() - started)
        assert reply[0] == b"PONG", reply
        socket.close()
    context.destroy(linger=0)
    check("handlers that block every worker do not delay a probe", worst < 0.5, f"{worst:.3f} s")
    await asyncio.gather(*slow)

    async def burst(index):
        async with cache.rpc_context(AGENT, invoke_timeout=30) as rpc:
            return await rpc.call.echo(index)

    got = await asyncio.gather(*(burst(index) for index in range(60)))
    check("60 connections at once", got == list(range(60)))


async def retries(cache):
    client = AgentClient(cache, AGENT, invoke_timeout=10)
    # The service fails this network twice; the manager's wrapper repeats on new connections.
    await client.create_local_network("fails-twice")
    async with cache.rpc_context(AGENT, invoke_timeout=10) as rpc:
        seen = await rpc.call.attempts()
    check("a failed call is repeated up to three times", seen == 3, str(seen))

    try:
        async with cache.rpc_context(AGENT, invoke_timeout=0.4) as rpc:
            await rpc.call.finish_later(1.0)
        check("the manager's timeout", False, "no timeout")
    except TimeoutError:
        check("the manager's timeout", True)
    deadline = time.monotonic() + 10
    finished = 0
    while time.monotonic() < deadline and not finished:
        async with cache.rpc_context(AGENT, invoke_timeout=10) as rpc:
            finished = await rpc.call.finished()
        await asyncio.sleep(0.05)
    check("a cancelled call runs to its end", finished == 1, str(finished))


async def null(address):
    cache = cache_for(address)
    await everyday(cache, sizes=(0, 1, 1 << 20, 8 << 20))
    await concurrency(cache)
    await retries(cache)


async def curve(address, agent_public, manager_secret):
    cache = cache_for(address, agent_public, manager_secret)
    await everyday(cache)
    await concurrency(cache)


async def refused(address, null_address, agent_public, manager_secret):
    stranger = zmq.curve_keypair()
    wrong_key = AgentRPCCache(None, PublicKey(stranger[0]), SecretKey(stranger[1]))
    wrong_key.update(AGENT, f"tcp://{address}", PublicKey(agent_public.encode()))
    other_node = zmq.curve_keypair()[0].decode()
    cases = {
        "another manager's key": wrong_key,
        "no key": cache_for(address),
        "the key of another agent": cache_for(address, other_node, manager_secret),
        "a key where the agent has none": cache_for(null_address, agent_public, manager_secret),
    }

    async def attempt(name, cache):
        try:
            async with cache.rpc_context(AGENT, invoke_timeout=15) as rpc:
                got = await rpc.call.ping("let me in")
            check(f"{name} is refused", False, f"returned {got!r}")
        except RPCError as error:
            check(f"{name} is refused", "AuthenticationError" in repr(error), repr(error))
        except Exception as error:
            check(f"{name} is refused", False, repr(error))

    await asyncio.gather(*(attempt(name, cache) for name, cache in cases.items()))
    cache = cache_for(address, agent_public, manager_secret)
    async with cache.rpc_context(AGENT, invoke_timeout=15) as rpc:
        check("the right key still works", await rpc.call.ping("in") == "in")


def unpack_reply(frames):
    tag, header, envelope = frames
    header = plain_msgpack.unpackb(header)
    envelope = plain_msgpack.unpackb(envelope)
    return tag, header, envelope


async def conformance(address, vector_file):
    cases = json.loads(pathlib.Path(vector_file).read_text())["cases"]
    context = zmq.asyncio.Context()
    # What the original answers by CANCELLED or ERROR, or not at all, is a failure here.
    ours_fails = {
        "handler raises CancelledError -> CANCELLED",
        "internal error -> ERROR",
        "unserialisable result: nothing is sent",
        "unknown method: NO answer and the receive loop of the real agent stops",
        "zip=true without snappy: same",
        "garbage body: same",
    }
    for case in cases:
        label = case["label"]
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(f"tcp://{address}")
        for frames in case["send_frames_hex"]:
            await socket.send_multipart([bytes.fromhex(frame) for frame in frames])
        count = 1 if label in ours_fails else len(case["reply_frames_hex"])
        replies = []
        for _ in range(count):
            replies.append(await asyncio.wait_for(socket.recv_multipart(), 5))
        # Whatever was sent, the connection and the server live on, and nothing else was sent.
        await socket.send_multipart([b"PING", b"after", b""])
        after = await asyncio.wait_for(socket.recv_multipart(), 5)
        check(f"{label}: answers afterwards", after == [b"PONG", b"after", b""], repr(after))
        if label in ours_fails:
            tag, header, envelope = unpack_reply(replies[0])
            sent = plain_msgpack.unpackb(bytes.fromhex(case["send_frames_hex"][0][1]))
            same_call = all(header[key] == sent[key] for key in ("meth", "okey", "seq"))
            meta = plain_msgpack.unpackb(envelope["meta"])
            passed = header["type"] == 3 and header["zip"] is False and same_call and len(meta) == 3
            check(f"{label}: FAILURE here", passed, f"{header} {meta}")
        else:
            expected = [[bytes.fromhex(frame) for frame in frames] for frames in case["reply_frames_hex"]]
            for got, wanted in zip(replies, expected, strict=True):
                if wanted[0] == b"UPPER" and unpack_reply(wanted)[1]["type"] == 3:
                    (_, header, envelope), (_, wanted_header, wanted_envelope) = map(unpack_reply, (got, wanted))
                    meta, wanted_meta = (plain_msgpack.unpackb(e["meta"]) for e in (envelope, wanted_envelope))
                    passed = (header, meta[:2], envelope["body"]) == (wanted_header, wanted_meta[:2], None)
                    check(label, passed, f"{header} {meta} != {wanted_meta}")
                else:
                    check(label, got == wanted, f"{got} != {wanted}")
        socket.close()
    context.destroy(linger=0)
    check("all cases ran", len(cases) >= 30)


def keys(directory):
    for name in ("agent", "manager", "stranger"):
        zmq.auth.create_certificates(directory, name)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "keys":
        keys(*arguments)
    else:
        asyncio.run({"null": null, "curve": curve, "refused": refused, "conformance": conformance}[command](*arguments))
        print(f"{len(failed)} failed")
        sys.exit(bool(failed))
