"""Records what the original's metadata service answers: python record_metadata.py > tests/vectors/metadata/answers.json

Runs in the environment that tests/scripts/manager-env makes. The service itself is the published one; only the engine that it asks
for containers is made up.
"""

import asyncio
import http.client
import json
import sys
import uuid
from types import SimpleNamespace

import ai.backend.agent.docker.metadata.server as original
from aiohttp import web

KERNEL = uuid.UUID("44843cf7-7964-4cd9-8c60-f8e4fdc69e3a")
ADDRESS = "127.0.0.1"
ENVIRON = {"LANG": "C.UTF-8", "Größe": 'a"b\\c/d\n\t\r\b\f\x01\x7f é € \U0001f600', "EMPTY": "", "N": "1"}
PATHS = [
    "/", "/latest", "/2020-01-01", "/latest/", "/2020-01-01/", "/latest/meta-data", "/latest/meta-data/", "/latest/meta-data/envs",
    "/latest/meta-data/envs?x=1", "/latest/meta-data/sandbox", "/latest/meta-data/local-ipv4", "/latest/extension", "/latest/extension/",
    "/latest/extension/x", "/latest/meta-data/nope", "/latest/meta-data/envs/", "/latest/meta-data/envs/x", "/nope/x", "/latest/meta-datax",
    "//", "/latest//", "/latest/meta-data//", "/latest//meta-data", "/latest/meta%2Ddata/envs", "/latest/%6deta-data", "/l%61test/", "/latest%2F",
    "/latest/meta-data%2Fenvs", "/latest/meta-data/sandb%6Fx%20", "/latest/%zz", "/latest/meta-data/%ff", "/%25latest", "/latest/meta%252Ddata",
]
OTHERS = [
    ("HEAD", "/"), ("HEAD", "/latest/meta-data/envs"), ("HEAD", "/latest/"), ("POST", "/"), ("POST", "/latest"), ("POST", "/latest/"),
    ("POST", "/latest/meta-data/envs"), ("POST", "/nope/x"), ("PUT", "/latest/meta-data"), ("OPTIONS", "/"),
]  # fmt: skip

containers = [{"NetworkSettings": {"Networks": {"bridge": {"IPAddress": ADDRESS}}}, "Labels": {"ai.backend.kernel-id": str(KERNEL)}}]


class Engine:
    def __init__(self):
        self.containers = self

    async def list(self, filters):
        return containers

    async def close(self):
        pass


class Settings(dict):
    agent = SimpleNamespace(docker_mode="native")


async def nothing(*_):
    pass


def ask(port, asker, method, path):
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    server = answer.getheader("Server")
    return {
        "asker": asker,
        "method": method,
        "path": path.partition("?")[0],
        "status": answer.status,
        "type": answer.getheader("Content-Type"),
        "server": None if server.startswith("Python/") else server,
        "body": answer.read().decode(),
    }


async def main():
    original.Docker = Engine
    original.prepare_kernel_metadata_uri_handling = nothing
    kernels = {KERNEL: SimpleNamespace(environ=ENVIRON)}
    service = await original.MetadataServer.new(Settings(container={"sandbox-type": "docker"}), None, kernels)
    runner = web.AppRunner(service.app)
    await runner.setup()
    site = web.TCPSite(runner, ADDRESS, 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    answers = []

    async def record(asker, method, path):
        answers.append(await asyncio.to_thread(ask, port, asker, method, path))

    for path in PATHS:
        await record("kernel", "GET", path)
    for method, path in OTHERS:
        await record("kernel", method, path)
    kernels.clear()
    await record("unregistered", "GET", "/latest/meta-data/envs")
    await record("unregistered", "GET", "/latest/meta-data/sandbox")
    containers.clear()
    for method, path in [("GET", "/"), ("GET", "/latest/meta-data/envs"), ("POST", "/latest/meta-data/envs"), ("GET", "/nope/x")]:
        await record("stranger", method, path)
    json.dump({"address": ADDRESS, "environ": ENVIRON, "answers": answers}, sys.stdout, indent=1, ensure_ascii=True)
    print()
    await runner.cleanup()


asyncio.run(main())
