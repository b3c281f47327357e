"""Accelerators as the manager and its users see them: CUDA devices of a stand-in driver, made-up ROCm devices."""

import contextlib
import json
import os
import stat
import subprocess

from compat_checks import SOON, Skipped, check, equal
from stack import engine
from stack.place import eventually

# Numbers that no driver gives; the nodes are clones of /dev/null.
FIRST_MINOR = 990_000
MOCK = """
slot_name = "rocm"
device_plugin_name = "ROCm"
devices = [
  { mother_uuid = "made-up-1", model_name = "AMD MI250", numa_node = 0, subproc_count = 108, memory_size = "40G", is_mig_device = false },
  { mother_uuid = "made-up-2", model_name = "AMD MI250", numa_node = 0, subproc_count = 108, memory_size = "40G", is_mig_device = false },
]
"""


@contextlib.contextmanager
def machine(bench):
    """Environment and configuration of a node with two CUDA devices and two made-up ones."""
    place = bench.agent.place.folder("accelerators")
    library, devices, mock = place / "libnvidia-ml.so.1", place / "devices", place / "mock-accelerator.toml"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, engine.ROOT / "tests/standin/nvml.c"], check=True)
    mock.write_text(MOCK)
    nodes = []
    try:
        for index in range(2):
            pci, minor = f"{16 + index:02x}:00.0", FIRST_MINOR + index
            information = place / f"root/proc/driver/nvidia/gpus/0000:{pci}/information"
            information.parent.mkdir(parents=True, exist_ok=True)
            information.write_text(f"Device Minor: {minor}\n")
            node = f"/dev/nvidia{minor}"
            try:
                os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except FileExistsError:
                pass
            except PermissionError as error:
                raise Skipped(f"device nodes cannot be made here: {error}") from error
            nodes.append(node)
        devices.write_text("".join(f"device {n} uuid=GPU-{n} name=Stand-in mem={80 << 30} pci=00000000:{16 + n:02X}:00.0 sms=132\n" for n in range(2)))
        environment = {"BAI_NVML_LIBRARY": str(library), "NVML_STANDIN": str(devices)}
        settings = f"""
[node.accelerators]
mock = "{mock}"
allocation-mode = "fractional"
unit-mem = "80g"
unit-proc = 132
cuda-injection = "device-nodes"
device-root = "{place}/root"
"""
        yield environment, settings
    finally:
        for node in nodes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(node)


@check
async def accelerators_are_slots_of_the_manager(bench):
    """A node with real (stand-in) and made-up devices: in the agent list, and a session with a share of a device."""
    agent = bench.agent
    if agent.kind != "ours":
        raise Skipped("the stand-in driver and the settings are ours")
    text, env = agent.text, dict(bench.system.engine.env)
    with machine(bench) as (environment, settings):
        agent.stop()
        agent.text = text.replace("allow-compute-plugins = []\n", "") + settings
        agent.write()
        bench.system.engine.env.update(environment)
        try:
            agent.start()

            async def announced():
                row = await bench.agent_row("status available_slots compute_plugins")
                slots = json.loads(row["available_slots"])
                return row if row["status"] == "ALIVE" and float(slots.get("cuda.shares", 0)) == 2 else None

            row = await eventually("the manager lists the accelerators", announced, SOON)
            slots = json.loads(row["available_slots"])
            equal(float(slots["rocm.device"]), 2.0, "made-up devices")
            assert {"cuda", "rocm"} <= set(json.loads(row["compute_plugins"])), row

            async def asked():
                return await bench.client.ComputeSession.get_or_create(
                    engine.PYTHON, name="shares", resources={"cpu": 1, "mem": "512m", "cuda.shares": "0.5"}, enqueue_only=True, no_reuse=True
                )

            # The manager looks at the slots it knows once a minute.
            session = await eventually("the manager knows the slot", asked, SOON, every=3)
            bench.sessions["shares"] = session
            row = await bench.session_is("shares", "RUNNING")
            occupied = json.loads(row["containers"][0]["occupied_slots"])
            equal(float(occupied["cuda.shares"]), 0.5, "the session's share")
            said = await bench.shell("shares", "env; ls /dev")
            assert "GPU_COUNT=1" in said and "GPU_CONFIG=0:40g" in said and f"nvidia{FIRST_MINOR}"[:-1] in said, said
            await bench.destroy("shares")
        finally:
            agent.stop()
            agent.text = text
            agent.write()
            bench.system.engine.env.clear()
            bench.system.engine.env.update(env)
            agent.start()
    await bench.agent_is("ALIVE")
