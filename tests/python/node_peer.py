"""Drives a real node with the manager's own client: the whole life of one kernel.

Usage: node_peer.py ADDRESS IMAGE_JSON [AGENT_PUBLIC MANAGER_SECRET_FILE]
       node_peer.py --refused ADDRESS AGENT_PUBLIC MANAGER_SECRET_FILE

IMAGE_JSON: {"canonical", "digest", "architecture", "labels"} of a local image. Prints a line per check; the exit
status tells whether all passed. The second form passes when nobody is let in: no key, a wrong key.
"""

import asyncio
import json
import sys
import uuid

import zmq
import zmq.auth
from ai.backend.common.auth import PublicKey, SecretKey
from ai.backend.common.docker import ImageRef
from ai.backend.common.types import AgentId, AutoPullBehavior, KernelId, SessionTypes
from ai.backend.manager.agent_cache import AgentRPCCache
from ai.backend.manager.clients.agent.client import AgentClient
from ai.backend.manager.exceptions import AgentError, RPCError

AGENT = AgentId("i-agent")
failed = []


def check(name, passed, detail=""):
    print(f"{'ok  ' if passed else 'FAIL'} {name} {detail if not passed else ''}".rstrip())
    if not passed:
        failed.append(name)


def cache_for(address, agent_public=None, pair=None):
    public, secret = pair or zmq.curve_keypair()
    cache = AgentRPCCache(None, PublicKey(public), SecretKey(secret))
    cache.update(AGENT, f"tcp://{address}", PublicKey(agent_public.encode()) if agent_public else None)
    return cache


def creation_config(image, kernel_id, session_id):
    return {
        "image": {
            "canonical": image["canonical"],
            "project": None,
            "architecture": image["architecture"],
            "digest": image["digest"],
            "repo_digest": None,
            "registry": {"name": "local", "url": "http://127.0.0.1", "username": None, "password": None},
            "labels": image["labels"],
            "is_local": True,
            "auto_pull": AutoPullBehavior.DIGEST,
        },
        "kernel_id": kernel_id,
        "session_id": session_id,
        "owner_user_id": str(uuid.uuid4()),
        "owner_project_id": None,
        "network_id": session_id,
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
        "resource_opts": {"shmem": str(16 << 20)},
        "environ": {"BACKENDAI_SERVICE_PORTS": "", "GREETING": "hello"},
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
    }


async def life(address, image, agent_public=None, secret_file=None):
    cache = cache_for(address, agent_public, zmq.auth.load_certificate(secret_file) if secret_file else None)
    async with cache.rpc_context(AGENT, invoke_timeout=10) as rpc:
        check("ping", await rpc.call.ping("pong") == "pong")
    agent = AgentClient(cache, AGENT)
    kernel_id, session_id = str(uuid.uuid4()), str(uuid.uuid4())
    cluster = {
        "mode": "SINGLE_NODE",
        "size": 1,
        "replicas": {"main": 1},
        "network_config": {},
        "ssh_keypair": None,
        "cluster_ssh_port_mapping": None,
    }
    reference = ImageRef.from_image_str(image["canonical"], None, "local", architecture=image["architecture"], is_local=True)
    create = lambda: agent.create_kernels(
        session_id, [kernel_id], [creation_config(image, kernel_id, session_id)], cluster, {KernelId(uuid.UUID(kernel_id)): reference}
    )
    results = await create()
    result = results[0]
    check("one result", len(results) == 1, results)
    check("its id", str(result["id"]) == kernel_id, result)
    check("a container", len(result["container_id"]) == 64, result)
    check("service ports", {port["name"] for port in result["service_ports"]} >= {"sshd", "ttyd"}, result["service_ports"])
    check("the slots", "cpu" in result["resource_spec"]["slots"], result["resource_spec"])
    again = await create()
    check("a repeated create returns the stored result", again[0]["container_id"] == result["container_id"])
    check("check_creating", await agent.check_creating(kernel_id) is True)

    # As the REST API does: a run id, then `continue` until it has finished.
    run_id, console, reply = uuid.uuid4().hex, [], None
    mode, opts = "batch", {"clean": None, "build": None, "exec": 'echo "$GREETING from $(hostname)"; echo oops >&2; exit 4'}
    for _ in range(100):
        reply = await agent.execute(session_id, kernel_id, 3, run_id, mode, "", opts, 2.0)
        console += reply["console"]
        if reply["status"] == "finished":
            break
        mode, opts = "continue", {}
    text = lambda kind: "".join(data for what, data in console if what == kind)
    check("finished", reply["status"] == "finished" and reply["runId"] == run_id, reply)
    check("exit code", reply["exitCode"] == 4, reply)
    check("stdout", text("stdout") == "hello from main1\n", console)
    check("stderr", text("stderr") == "oops\n", console)

    logs = await agent.get_logs(kernel_id)
    check("logs", isinstance(logs["logs"], str) and "hello from main1" in logs["logs"], logs)
    await agent.upload_file(kernel_id, "dir/note.txt", b"from the manager")
    check("download", await agent.download_single(kernel_id, "dir/note.txt") == b"from the manager")
    files = await agent.list_files(kernel_id, "dir")
    check("list", [item["filename"] for item in json.loads(files["files"])] == ["note.txt"], files)

    await agent.destroy_kernel(kernel_id, session_id, "user-requested", suppress_events=False)
    check("destroyed", await agent.check_creating(kernel_id) is False)
    await agent.destroy_kernel(kernel_id, session_id, "user-requested", suppress_events=False)
    check("a repeated destroy succeeds", True)
    logs = await agent.get_logs(kernel_id)
    check("the logs of an ended kernel are kept", "hello from main1" in logs["logs"], logs)
    try:
        await agent.get_logs(str(uuid.uuid4()))
        check("an unknown kernel", False, "no error")
    except AgentError as error:
        check("an unknown kernel", "KeyError" in repr(error), repr(error))


async def refused(address, agent_public, secret_file):
    right = zmq.auth.load_certificate(secret_file)
    tries = {
        "no key": cache_for(address),
        "a wrong manager key": cache_for(address, agent_public),
        "a wrong agent key": cache_for(address, zmq.curve_keypair()[0].decode(), right),
    }
    for name, cache in tries.items():
        try:
            async with cache.rpc_context(AGENT, invoke_timeout=10) as rpc:
                await rpc.call.ping("x")
            check(f"{name} is refused", False, "it was served")
        except (RPCError, TimeoutError):
            check(f"{name} is refused", True)
    async with cache_for(address, agent_public, right).rpc_context(AGENT, invoke_timeout=10) as rpc:
        check("the right key is served", await rpc.call.ping("x") == "x")


if __name__ == "__main__":
    if sys.argv[1] == "--refused":
        asyncio.run(refused(*sys.argv[2:]))
    else:
        asyncio.run(life(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:]))
    sys.exit(1 if failed else 0)
