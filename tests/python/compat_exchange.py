"""A node changes from the Python agent to ours while a session runs."""

import asyncio
import json
import time

import aiohttp
from compat_checks import SOON, Skipped, check, equal
from stack import engine
from stack.agents import Agent
from stack.place import eventually


@check
async def a_session_of_the_python_agent_goes_on_under_ours(bench):
    if bench.agent.kind == "python":
        raise Skipped("there is nothing to change to")
    ours, theirs = bench.agent, Agent(bench.system, "python", node=bench.agent)
    # This manager takes events at the same time: the first heartbeat of an agent that goes at once may come last.
    await asyncio.sleep(5)
    await asyncio.to_thread(ours.stop)
    await bench.agent_is("TERMINATED")
    bench.agent = theirs
    try:
        await asyncio.to_thread(theirs.start)
        await bench.agent_is("ALIVE")
        await bench.create("exchanged", engine.PYTHON, mem=256, mounts=["data"])
        await bench.session_is("exchanged", "RUNNING")
        text, _ = await bench.execute("exchanged", "n = 40\nprint(n)")
        equal(text, "40\n", "console")
        # It ends once it is told, which the agent that began it does not see.
        line = "while [ ! -e data/go ]; do sleep 0.2; done; echo computed"
        await bench.create("exchanged-batch", engine.APP, mem=256, type_="batch", startup_command=line, mounts=["data"])
        await bench.session_is("exchanged-batch", "RUNNING")
        before = len(bench.proxy.told)
        await bench.sessions["exchanged"].start_service("web")
        service = bench.proxy.told[before]
        (container,) = bench.containers(bench.sessions["exchanged"].id)
    finally:
        await asyncio.to_thread(theirs.stop)
        bench.agent, taken = ours, time.time()
        await asyncio.to_thread(ours.start)
    await bench.agent_is("ALIVE")
    equal(bench.containers(bench.sessions["exchanged"].id), [container], "containers")
    text, _ = await bench.execute("exchanged", "print(n + 2)")
    equal(text, "42\n", "a variable of before")
    kernels = json.loads(await asyncio.to_thread(ours.command, "kernel", "list", "--output", "json"))["kernels"]
    begun = {kernel["created_at"] for kernel in kernels}
    assert len(kernels) == 2 and all(taken - 600 < at < taken for at in begun), (begun, taken)

    async def ports():
        return json.loads(await asyncio.to_thread(ours.command, "ports", "--output", "json"))["ports"]

    async def page():
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://{service['kernel_host']}:{service['kernel_port']}/", timeout=aiohttp.ClientTimeout(10)) as reply:
                return (await reply.text()).strip() == "python"

    # The engine publishes its ports until it ends.
    await eventually("the page of a service of before", page, SOON)
    (folder,) = {path.parent for path in bench.system.volume.glob("**/written")}
    (folder / "go").touch()
    row = await bench.session_is("exchanged-batch", "TERMINATED")
    equal(row["result"], "SUCCESS", "the result of the batch session")
    del bench.sessions["exchanged-batch"]
    rows = await ports()
    assert service["kernel_port"] in [row["host_port"] for row in rows], rows
    equal({row["path"] for row in rows}, {"engine"}, "the paths of all ports")
    async def measured():
        (kernel,) = (await bench.session_row("exchanged"))["containers"]
        live = json.loads(kernel["live_stat"] or "{}")
        return {"cpu_util", "mem", "net_rx", "io_read"} <= set(live) and int(live["mem"]["capacity"]) == 256 << 20

    await eventually("statistics of the kernel", measured, SOON)

    # The engine holds ports of the same range: nobody else gets them.
    published = await asyncio.to_thread(bench.system.engine.docker, "port", container)
    slots = json.loads((await bench.agent_row())["occupied_slots"])
    equal(slots["cpu"], "1", "occupied slots of the agent")
    held = {int(line.rsplit(":", 1)[1]) for line in published.splitlines()}
    assert held > {row["host_port"] for row in rows}, published
    await bench.create("beside", engine.PYTHON, mem=256)
    await bench.session_is("beside", "RUNNING")
    others = {row["host_port"] for row in await ports() if row["path"] != "engine"}
    assert others and not others & held, (others, held)
    await bench.destroy("beside")

    session = bench.sessions["exchanged"]
    await session.restart()
    await bench.session_is("exchanged", "RUNNING")
    assert bench.containers(session.id) != [container], "the container is the same"
    assert all(row["path"] != "engine" for row in await ports()), await ports()
    await bench.destroy("exchanged")
    await eventually("its container is removed", lambda: asyncio.to_thread(lambda: not bench.containers(session.id)), SOON)
    left = [path.name for path in ours.scratch.iterdir()]
    assert not left, f"scratch directories: {left}"

