"""Calls every method of the agent with the manager's own client, against a whole node and a registry.

Usage: manager_methods.py ADDRESS SETTINGS_JSON

SETTINGS_JSON: {"canonical", "digest", "architecture", "labels"} of an image that lies in a registry and not in the
engine, "registry", "username", "password", "mark" (a label that tells this run's images). Prints a line per check and
the methods that were called; the exit status tells whether all passed.
"""

import asyncio
import io
import json
import sys
import tarfile
import urllib.request
import uuid

import zmq
from ai.backend.common.auth import PublicKey, SecretKey
from ai.backend.common.docker import ImageRef, LabelName
from ai.backend.common.types import AgentId, AutoPullBehavior, KernelId, SessionTypes
from ai.backend.manager.agent_cache import AgentRPCCache, PeerInvoker
from ai.backend.manager.clients.agent.client import AgentClient
from ai.backend.manager.exceptions import AgentError

AGENT = AgentId("i-agent")
failed = []
called = set()


def check(name, passed, detail=""):
    print(f"{'ok  ' if passed else 'FAIL'} {name} {detail if not passed else ''}".rstrip(), flush=True)
    if not passed:
        failed.append(name)


def note_calls():
    """What goes over the wire is what counts as called."""
    original = PeerInvoker._CallStub.__getattr__

    def noting(stub, name):
        called.add(name)
        return original(stub, name)

    PeerInvoker._CallStub.__getattr__ = noting


class Session:
    """A kernel of its own session."""

    def __init__(self, node, image, **changes):
        self.node, self.image = node, image
        self.id, self.kernel = str(uuid.uuid4()), str(uuid.uuid4())
        self.cluster = {
            "mode": "SINGLE_NODE",
            "size": 1,
            "replicas": {"main": 1},
            "network_config": {},
            "ssh_keypair": None,
            "cluster_ssh_port_mapping": None,
        }
        self.config = {
            "image": image,
            "kernel_id": self.kernel,
            "session_id": self.id,
            "owner_user_id": str(uuid.uuid4()),
            "owner_project_id": None,
            "network_id": self.id,
            "session_type": SessionTypes.INTERACTIVE,
            "cluster_mode": "SINGLE_NODE",
            "cluster_role": "main",
            "cluster_idx": 1,
            "local_rank": 0,
            "cluster_hostname": "main1",
            "uid": None,
            "main_gid": None,
            "supplementary_gids": [],
            "resource_slots": {"cpu": "0.1", "mem": str(128 << 20)},
            "resource_opts": {},
            "environ": {"BACKENDAI_SERVICE_PORTS": ""},
            "mounts": [],
            "package_directory": [],
            "idle_timeout": 600,
            "bootstrap_script": None,
            "startup_command": None,
            "internal_data": None,
            "auto_pull": AutoPullBehavior.DIGEST,
            "preopen_ports": [],
            "allocated_host_ports": [],
            "agent_addr": "tcp://127.0.0.1:6001",
            "scaling_group": "default",
            "endpoint_id": None,
        } | changes

    @property
    def reference(self):
        registry = self.image["registry"]["name"]
        return ImageRef.from_image_str(
            self.image["canonical"], self.image["project"], registry, architecture=self.image["architecture"]
        )

    async def create(self):
        references = {KernelId(uuid.UUID(self.kernel)): self.reference}
        results = await self.node.client.create_kernels(self.id, [self.kernel], [self.config], self.cluster, references)
        return results[0]

    async def run(self, command):
        """The output and the exit code of a shell command."""
        run_id, output, mode, opts = uuid.uuid4().hex, "", "batch", {"clean": None, "build": None, "exec": command}
        while True:
            reply = await self.node.client.execute(self.id, self.kernel, 3, run_id, mode, "", opts, 2.0)
            output += "".join(data for what, data in reply["console"] if what == "stdout")
            if reply["status"] == "finished":
                return output, reply["exitCode"]
            mode, opts = "continue", {}


class Node:
    def __init__(self, address):
        public, secret = zmq.curve_keypair()
        self.cache = AgentRPCCache(None, PublicKey(public), SecretKey(secret))
        self.cache.update(AGENT, f"tcp://{address}", None)
        self.client = AgentClient(self.cache, AGENT)

    async def raw(self, method, *args):
        async with self.cache.rpc_context(AGENT, invoke_timeout=60) as rpc:
            return await getattr(rpc.call, method)(*args)

    async def events(self):
        reply = await self.raw("bai.events", 0, 0.0, 1000)
        return [(event["name"], event["args"]) for event in reply["events"]]

    async def event(self, wanted, *args, limit=60):
        """The first event of one of these names whose arguments begin with `args`; None when none comes."""
        names = {wanted} if isinstance(wanted, str) else set(wanted)
        for _ in range(limit * 10):
            for name, have in await self.events():
                if name in names and tuple(have[: len(args)]) == args:
                    return name, have
            await asyncio.sleep(0.1)
        return None, ()

    async def task(self, answer):
        """How a background task ended."""
        task = str(uuid.UUID(answer))
        return await self.event(["bgtask_done", "bgtask_failed", "bgtask_cancelled"], task)


async def images(node, image, settings):
    client = node.client
    wrong = image | {"registry": image["registry"] | {"password": "wrong"}}
    tasks = await client.check_and_pull({image["canonical"]: wrong})
    check("a wrong password fails the task", (await node.task(tasks[image["canonical"]]))[0] == "bgtask_failed")
    name, args = await node.event("image_pull_failed", image["canonical"])
    check("and the pull is told to have failed", name is not None and "unauthorized" in args[2] or "no basic auth" in args[2], args)
    never = image | {"auto_pull": AutoPullBehavior.NONE}
    tasks = await client.check_and_pull({image["canonical"]: never})
    name, args = await node.task(tasks[image["canonical"]])
    check("without auto-pull an absent image fails", name == "bgtask_failed" and "auto-pull" in args[1], args)

    tasks = await client.check_and_pull({image["canonical"]: image})
    task = tasks[image["canonical"]]
    check("task ids have 32 digits", len(task) == 32 and "-" not in task, task)
    check("the pull is done", (await node.task(task))[0] == "bgtask_done")
    name, args = await node.event("image_pull_finished", image["canonical"])
    check("and told", name is not None and args[3] is None, args)
    check("nothing is being pulled", await client.check_pulling(image["canonical"]) is False)


async def use(node, session):
    client, kernel = node.client, session.kernel
    check("not yet creating", await client.check_creating(kernel) is False)
    network = f"bai-test-{session.id}"
    await client.create_local_network(network)
    await client.create_local_network(network)
    check("an existing network is a success", True)
    session.cluster["network_config"] = {"mode": "bridge", "network_name": network}
    result = await session.create()
    check("created", str(result["id"]) == kernel and len(result["container_id"]) == 64, result)
    check("check_creating", await client.check_creating(kernel) is True)
    check("check_running", await client.check_running(kernel) is True)
    output, code = await session.run("echo ready; touch /tmp/kept; exit 3")
    check("execute", (output, code) == ("ready\n", 3), (output, code))

    running = asyncio.ensure_future(session.run("sleep 60"))
    interrupted = None
    for _ in range(100):
        interrupted = await client.interrupt_kernel(kernel) is None
        done, _ = await asyncio.wait([running], timeout=0.5)
        if done:
            break
    check("interrupt_kernel", running.done() and interrupted and running.result()[1] != 0)

    reply = await client.get_completions(kernel, "im", {"row": 0, "col": 2, "line": "im", "post": ""})
    check("get_completions", set(reply["result"]) == {"status", "error", "suggestions"} and reply["result"]["status"] == "finished", reply)
    status = await node.raw("ping_kernel", kernel)
    check("ping_kernel", status is None or all(isinstance(value, float) for value in status.values()), status)

    reply = await client.start_service(kernel, "web", {})
    check("start_service", reply["status"] == "started", reply)
    port = next(item for item in result["service_ports"] if item["name"] == "web")["host_ports"][0]
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).status)
    check("and it serves", page == 200, page)
    check("shutdown_service", await client.shutdown_service(kernel, "web") is None)
    reply = await client.start_service(kernel, "no-such", {})
    check("an unknown service", reply["status"] == "failed" and reply["error"], reply)

    check("upload_file", await client.upload_file(kernel, "dir/note.txt", b"\x00from the manager") is None)
    check("download_single", await client.download_single(kernel, "dir/note.txt") == b"\x00from the manager")
    archive = tarfile.open(fileobj=io.BytesIO(await client.download_file(kernel, "dir/note.txt")))
    check("download_file", [member.name for member in archive] == ["note.txt"])
    files = await client.list_files(kernel, "dir")
    item = json.loads(files["files"])[0]
    check("list_files", {"mode", "size", "ctime", "mtime", "atime", "filename"} <= set(item), files)
    check("get_logs", isinstance((await client.get_logs(kernel))["logs"], str))

    await client.trigger_batch_execution(session.id, kernel, "exit 5", 60.0)
    name, args = await node.event("session_failure", session.id)
    check("trigger_batch_execution", name is not None and list(args[1:]) == ["task-failed", 5], args)
    return network


async def commits(node, session, settings):
    """An archive, then an image that goes to the registry and comes back."""
    client, kernel = node.client, session.kernel
    mark = {settings["mark"]: "archive"}
    base = session.image["canonical"]
    reply = await client.commit(kernel, "user_example.com", base, mark, "kept.tar.gz")
    check("commit answers path and kernel", (reply["kernel"], reply["path"]) == (kernel, "user_example.com/kept.tar.gz"), reply)
    check("the archive is made", (await node.task(reply["bgtask_id"]))[0] == "bgtask_done")
    status = await node.raw("get_commit_status", kernel, "user_example.com")
    check("get_commit_status", status == {"kernel": kernel, "status": "ready"}, status)
    try:
        await client.commit(kernel, "..", base, {}, "x.tar.gz")
        check("a path that leads away is refused", False)
    except AgentError as error:
        check("a path that leads away is refused", "ValueError" in repr(error), repr(error))

    canonical = base.rsplit(":", 1)[0] + ":customized"
    labels = {LabelName.CUSTOMIZED_OWNER: "user:1111", LabelName.CUSTOMIZED_NAME: 'with "quotes" and = signs', settings["mark"]: "image"}
    reply = await client.commit(kernel, "user_example.com", canonical, labels)
    check("no path for an image", reply["path"] is None, reply)
    check("the image is made", (await node.task(reply["bgtask_id"]))[0] == "bgtask_done")
    image = session.image | {"canonical": canonical}
    reference = Session(node, image).reference
    registry = session.image["registry"]
    reply = await client.push_image(reference, registry | {"password": "wrong"})
    check("push_image answers the name", reply["canonical"] == canonical, reply)
    check("a wrong password fails the push", (await node.task(reply["bgtask_id"]))[0] == "bgtask_failed")
    reply = await client.push_image(reference, registry)
    check("the push is done", (await node.task(reply["bgtask_id"]))[0] == "bgtask_done")
    reply = await client.purge_images([canonical, "no-such/image:1"], True, False)
    errors = [item["error"] for item in reply["responses"]]
    check("purge_images tells per image", errors[0] is None and isinstance(errors[1], str), reply)
    return image | {"digest": "sha256:" + "0" * 64}


async def life(address, settings):
    note_calls()
    node = Node(address)
    client = node.client
    check("ping", await node.raw("ping", "pong") == "pong")
    check("gather_hwinfo", await client.gather_hwinfo() == {})
    check("scan_gpu_alloc_map", await client.scan_gpu_alloc_map() == {})
    local = await client.get_local_config()
    check("get_local_config", local == {"agent": {"abuse-report-path": ""}, "watcher": {}}, local)

    image = {
        "canonical": settings["canonical"],
        "project": "stable",
        "architecture": settings["architecture"],
        "digest": settings["digest"],
        "repo_digest": None,
        "registry": {
            "name": settings["registry"],
            "url": f"http://{settings['registry']}",
            "username": settings["username"],
            "password": settings["password"],
        },
        "labels": settings["labels"],
        "is_local": False,
        "auto_pull": AutoPullBehavior.DIGEST,
    }
    await images(node, image, settings)
    session = Session(node, image, preopen_ports=[8500])
    network = await use(node, session)
    customized = await commits(node, session, settings)

    result = await client.restart_kernel(session.id, session.kernel, session.reference, {})
    keys = {"container_id", "repl_in_port", "repl_out_port", "stdin_port", "stdout_port", "service_ports"}
    check("restart_kernel", keys <= set(result), result)
    check("destroy_kernel", await client.destroy_kernel(session.kernel, session.id, "user-requested") is None)
    check("and it is gone", await client.check_creating(session.kernel) is False)
    check("destroy_local_network", await client.destroy_local_network(network) is None)
    await client.destroy_local_network(network)

    # The image that was committed and pushed comes back and runs.
    tasks = await client.check_and_pull({customized["canonical"]: customized})
    name, args = await node.task(tasks[customized["canonical"]])
    check("the committed image is pulled", name == "bgtask_done", args)
    again = Session(node, customized, preopen_ports=[8500], auto_pull=AutoPullBehavior.TAG)
    await again.create()
    output, _ = await again.run("ls /tmp/kept")
    check("the committed file is in it", output == "/tmp/kept\n", output)

    await client.drop_kernel_registry([KernelId(uuid.UUID(again.kernel))])
    for _ in range(300):
        if not await client.check_creating(again.kernel):
            break
        await asyncio.sleep(0.1)
    check("drop_kernel_registry", await client.check_creating(again.kernel) is False)

    purged = Session(node, image)
    result = await purged.create()
    await client.purge_containers([(result["container_id"], purged.kernel)])
    for _ in range(300):
        if not await client.check_creating(purged.kernel):
            break
        await asyncio.sleep(0.1)
    check("purge_containers", await client.check_creating(purged.kernel) is False)

    strange, kept = (str(uuid.uuid4()), str(uuid.uuid4())), Session(node, image)
    await kept.create()
    await client.sync_kernel_registry([strange, (kept.kernel, kept.id)])
    name, args = await node.event("kernel_terminated", *strange)
    check("sync_kernel_registry", name is not None and args[2] == "already-terminated", args)
    check("and what is listed lives on", await client.check_running(kept.kernel) is True)

    port = await client.assign_port()
    check("assign_port", isinstance(port, int), port)
    check("release_port", await node.raw("release_port", port) is None)
    check("update_scaling_group", await client.update_scaling_group("night-shift") is None)
    check("shutdown_agent", await node.raw("shutdown_agent", False) is None)
    check("and kernels live on", await client.check_running(kept.kernel) is True)
    check("reset_agent", await node.raw("reset_agent") is None)
    check("and no kernel is left", await client.check_creating(kept.kernel) is False)
    print("called", *sorted(name for name in called if not name.startswith("bai.")))


asyncio.run(life(sys.argv[1], json.loads(sys.argv[2])))
sys.exit(1 if failed else 0)
