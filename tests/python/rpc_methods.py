"""Calls every RPC method of the agent through the manager's own client class and checks the shape of each result.

Usage: rpc_methods.py ADDRESS IMAGE_JSON

The agent is a standalone node of its own: the last call destroys all its kernels. IMAGE_JSON as for node_peer.py. Prints a
line per method; the exit status tells whether all passed.
"""

import asyncio
import io
import json
import re
import sys
import tarfile
import time
import uuid

from ai.backend.common.docker import ImageRef
from ai.backend.common.types import AutoPullBehavior, KernelId
from ai.backend.manager.clients.agent.client import AgentClient
from ai.backend.manager.exceptions import AgentError

from node_peer import AGENT, cache_for, creation_config

# Those that the class of this release has no method for are called by name over the same connection.
CATALOGUE = """ping gather_hwinfo check_and_pull check_pulling create_kernels check_creating check_running destroy_kernel restart_kernel
execute interrupt_kernel trigger_batch_execution get_completions start_service shutdown_service get_logs upload_file download_file
download_single list_files commit push_image get_commit_status purge_images sync_kernel_registry purge_containers
drop_kernel_registry create_local_network destroy_local_network assign_port release_port scan_gpu_alloc_map update_scaling_group
get_local_config ping_kernel shutdown_agent reset_agent""".split()

called, failed = set(), []
since = time.monotonic()


async def within(seconds, condition):
    end = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        await asyncio.sleep(0.2)


class Caller:
    def __init__(self, address):
        self.cache = cache_for(address)
        self.client = AgentClient(self.cache, AGENT)

    async def __call__(self, method, *args, **kwargs):
        called.add(method)
        if hasattr(self.client, method):
            return await getattr(self.client, method)(*args, **kwargs)
        return await self.once(method, *args, **kwargs)

    async def once(self, method, *args, **kwargs):
        """Without the class, which tries thrice what fails."""
        called.add(method)
        async with self.cache.rpc_context(AGENT, invoke_timeout=60) as rpc:
            return await getattr(rpc.call, method)(*args, **kwargs)


def say(name, problem=None):
    global since
    took, since = time.monotonic() - since, time.monotonic()
    print(f"FAIL {name}: {problem}" if problem else f"ok   {name} ({took:.1f} s)", flush=True)
    if problem:
        failed.append(name)


async def expect(name, shape, awaitable):
    """Awaits a call and holds its result against a value or a predicate."""
    try:
        result = await asyncio.wait_for(awaitable, 120)
    except Exception as error:
        say(name, repr(error))
        return None
    right = shape(result) if callable(shape) else result == shape and type(result) is type(shape)
    say(name, None if right else f"returned {result!r:.300}")
    return result


async def refused(name, error_name, awaitable):
    try:
        say(name, f"returned {await asyncio.wait_for(awaitable, 120)!r:.200}")
    except AgentError as error:
        say(name, None if error.exc_name == error_name else f"{error.exc_name}: {error.exc_repr}")
    except Exception as error:
        say(name, repr(error))


async def main(address, image):
    call = Caller(address)
    session, kernel = str(uuid.uuid4()), str(uuid.uuid4())
    reference = ImageRef.from_image_str(image["canonical"], None, "local", architecture=image["architecture"], is_local=True)
    cluster = {"mode": "SINGLE_NODE", "size": 1, "replicas": {"main": 1}, "network_config": {}, "ssh_keypair": None, "cluster_ssh_port_mapping": None}
    config = creation_config(image, kernel, session)

    await expect("ping", "word", call("ping", "word"))
    await expect("gather_hwinfo", lambda found: isinstance(found, dict) and all(set(item) == {"status", "status_info", "metadata"} for item in found.values()), call("gather_hwinfo"))
    await expect("scan_gpu_alloc_map", lambda found: isinstance(found, dict) and all(isinstance(item, str) for pair in found.items() for item in pair), call("scan_gpu_alloc_map"))
    await expect("get_local_config", lambda found: set(found) == {"agent", "watcher"} and isinstance(found["agent"]["abuse-report-path"], str) and isinstance(found["watcher"], dict), call("get_local_config"))
    await expect("check_and_pull", lambda found: list(found) == [image["canonical"]] and re.fullmatch("[0-9a-f]{32}", found[image["canonical"]]), call("check_and_pull", {image["canonical"]: {**config["image"], "auto_pull": AutoPullBehavior.DIGEST}}))
    await expect("check_pulling", lambda found: isinstance(found, bool), call("check_pulling", image["canonical"]))
    await expect("check_pulling of an unknown image", False, call("check_pulling", "local/stable/nothing:1"))

    port = await expect("assign_port", lambda found: type(found) is int and 0 < found < 65536, call("assign_port"))
    await expect("release_port", None, call("release_port", port))
    network = f"bai-test-{uuid.uuid4().hex[:12]}"
    await expect("create_local_network", None, call("create_local_network", network))
    await expect("create_local_network of an existing one", None, call("create_local_network", network))
    await expect("destroy_local_network", None, call("destroy_local_network", network))
    await expect("destroy_local_network of an unknown one", None, call("destroy_local_network", network))

    fields = {"id", "kernel_host", "repl_in_port", "repl_out_port", "stdin_port", "stdout_port", "service_ports", "container_id", "resource_spec", "attached_devices", "agent_addr", "scaling_group"}

    def created(found):
        (item,) = found
        ports = all({"name", "protocol", "container_ports", "host_ports", "is_inference"} <= set(port) for port in item["service_ports"])
        spec = {"slots", "allocations", "scratch_disk_size", "mounts"} <= set(item["resource_spec"])
        return fields <= set(item) and str(item["id"]) == kernel and ports and spec and len(item["container_id"]) == 64

    found = await expect("create_kernels", created, call("create_kernels", session, [kernel], [config], cluster, {KernelId(uuid.UUID(kernel)): reference}))
    await expect("check_creating", True, call("check_creating", kernel))
    await expect("check_running", True, call("check_running", kernel))
    await expect("check_running of an unknown kernel", False, call("check_running", str(uuid.uuid4())))
    await expect("ping_kernel", lambda found: found is None or all(isinstance(item, float) for item in found.values()), call("ping_kernel", kernel))

    run = uuid.uuid4().hex

    async def executed():
        mode, opts, text = "batch", {"clean": None, "build": None, "exec": "echo done; exit 2"}, ""
        while True:
            answer = await call("execute", session, kernel, 3, run, mode, "", opts, 2.0)
            assert set(answer) >= {"runId", "status", "exitCode", "options", "files", "console"}, answer
            text += "".join(data for kind, data in answer["console"] if kind == "stdout")
            if answer["status"] == "finished":
                return text, answer["exitCode"], answer["runId"] == run, len(answer["files"])
            mode, opts = "continue", {}

    await expect("execute", lambda found: found == ("done\n", 2, True, 0), executed())
    await refused("execute for an unknown kernel", "RuntimeError", call.once("execute", session, str(uuid.uuid4()), 3, run, "batch", "", {}, 2.0))
    await expect("interrupt_kernel", None, call("interrupt_kernel", kernel))
    await expect("get_completions", lambda found: set(found["result"]) >= {"status", "error", "suggestions"} and isinstance(found["result"]["suggestions"], (list, tuple)), call("get_completions", kernel, "pri", {"row": 1, "col": 3, "line": "pri", "post": ""}))
    await expect("start_service", lambda found: found["status"] == "started", call("start_service", kernel, "web", {}))
    await expect("start_service of an unknown one", lambda found: found["status"] == "failed" and isinstance(found["error"], str), call("start_service", kernel, "nothing", {}))
    await expect("shutdown_service", None, call("shutdown_service", kernel, "web"))
    await expect("get_logs", lambda found: isinstance(found["logs"], str), call("get_logs", kernel))
    await refused("get_logs of an unknown kernel", "KeyError", call.once("get_logs", str(uuid.uuid4())))
    await refused("get_logs of no uuid", "ValueError", call.once("get_logs", "kernel"))

    await expect("upload_file", None, call("upload_file", kernel, "dir/note.txt", b"from the manager"))
    await refused("upload_file outside", "PermissionError", call.once("upload_file", kernel, "../../etc/passwd", b""))
    await expect("download_single", b"from the manager", call("download_single", kernel, "dir/note.txt"))

    def archive(data):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            return type(data) is bytes and tar.extractfile("note.txt").read() == b"from the manager"

    await expect("download_file", archive, call("download_file", kernel, "dir/note.txt"))
    await refused("download_file outside", "PermissionError", call.once("download_file", kernel, "/etc/passwd"))

    def listed(found):
        (item,) = json.loads(found["files"])
        return found["abspath"] == "dir" and isinstance(found["errors"], str) and set(item) >= {"mode", "size", "ctime", "mtime", "atime", "filename"} and item["size"] == 16

    await expect("list_files", listed, call("list_files", kernel, "dir"))

    await expect("commit", lambda found: uuid.UUID(found["bgtask_id"]) and found["kernel"] == kernel and found["path"] == "admin_compat.test/kept.tar.gz", call("commit", kernel, "admin_compat.test", filename="kept.tar.gz"))
    status = lambda: call("get_commit_status", kernel, "admin_compat.test")
    await expect("get_commit_status", lambda found: found["kernel"] == kernel and found["status"] in ("ready", "ongoing"), status())

    async def ready():
        return (await status())["status"] == "ready"

    await expect("the end of a commit", lambda _found: True, within(120, ready))
    # Nobody serves this registry: the task fails in the background, the call does not.
    registry = {"name": "127.0.0.1:9", "url": "http://127.0.0.1:9", "username": None, "password": None}
    await expect("push_image", lambda found: uuid.UUID(found["bgtask_id"]) and isinstance(found["canonical"], str), call("push_image", reference, registry))
    await expect("purge_images", lambda found: [set(item) for item in found["responses"]] == [{"image", "error"}] and isinstance(found["responses"][0]["error"], str), call("purge_images", ["local/stable/nothing:1"], False, False))

    old = found[0]["container_id"] if found else ""
    await expect("restart_kernel", lambda found: {"container_id", "repl_in_port", "repl_out_port", "stdin_port", "stdout_port", "service_ports"} <= set(found) and found["container_id"] != old, call("restart_kernel", session, kernel, reference, {}))
    await expect("trigger_batch_execution", None, call("trigger_batch_execution", session, kernel, "echo batch > /home/work/batch", 30))

    async def batch_ran():
        try:
            return await call.once("download_single", kernel, "batch") == b"batch\n"
        except AgentError:
            return False

    await expect("the end of a batch", lambda _found: True, within(60, batch_ran))
    await expect("sync_kernel_registry", None, call("sync_kernel_registry", [(kernel, session)]))
    await expect("check_running after a sync", True, call("check_running", kernel))
    await expect("destroy_kernel", None, call("destroy_kernel", kernel, session, "user-requested", suppress_events=False))
    await expect("destroy_kernel again", None, call("destroy_kernel", kernel, session, "user-requested", suppress_events=False))
    await expect("check_creating after the end", False, call("check_creating", kernel))

    for method in ("purge_containers", "drop_kernel_registry", "reset_agent"):
        another = str(uuid.uuid4())
        made = await call("create_kernels", session, [another], [creation_config(image, another, session)], cluster, {KernelId(uuid.UUID(another)): reference})
        if method == "purge_containers":
            await expect(method, None, call(method, [(made[0]["container_id"], another)]))
        elif method == "drop_kernel_registry":
            await expect(method, None, call(method, [KernelId(uuid.UUID(another))]))
        else:
            await expect("shutdown_agent", None, call("shutdown_agent", False))
            await expect("check_running after it", True, call("check_running", another))
            await expect(method, None, call(method))

        async def gone():
            return not await call("check_creating", another)

        await expect(f"the end of a kernel by {method}", lambda _found: True, within(60, gone))
    await expect("update_scaling_group", None, call("update_scaling_group", "another"))
    say("every method was called", None if called == set(CATALOGUE) else f"not {set(CATALOGUE) - called}")


asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
sys.exit(1 if failed else 0)
