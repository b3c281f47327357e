"""Accelerators as the manager and its users see them: CUDA devices of a stand-in driver, made-up ROCm devices."""

import contextlib
import json
import os
import re
import stat
import subprocess

from compat_checks import SOON, Skipped, check, equal
from stack import engine
from stack.agents import AGENT_ID
from stack.place import eventually

# Numbers that no driver gives; devices' nodes are clones of /dev/null, parts' nodes open nothing.
FIRST_MINOR = 990_000
CAPABILITIES = 4001
DEVICES, DIVIDED, PARTS = 8, (6, 7), 3
MIG = "cuda.device:1g.10gb-mig"
# What all ids begin with: the manager reads them as UUIDs. The device's number follows, and in a part's id its own.
UUID = "8f0f9c8e-0000-4000-8000-00000000"
MOCK = """
slot_name = "rocm"
device_plugin_name = "ROCm"
devices = [
  { mother_uuid = "made-up-1", model_name = "AMD MI250", numa_node = 0, subproc_count = 108, memory_size = "40G", is_mig_device = false },
  { mother_uuid = "made-up-2", model_name = "AMD MI250", numa_node = 0, subproc_count = 108, memory_size = "40G", is_mig_device = false },
]
"""


def driver():
    """Files of the kernel and lines of the stand-in for devices, the last of which are divided into parts, and the nodes of both."""
    files, lines = {"proc/devices": f"Character devices:\n{CAPABILITIES} nvidia-caps\n"}, []
    nodes = {name: (1, 3) for name in ("/dev/nvidiactl", "/dev/nvidia-uvm")}
    for index in range(DEVICES):
        pci, minor = f"{16 + index:02x}:00.0", FIRST_MINOR + index
        nodes[f"/dev/nvidia{minor}"] = (1, 3)
        lines.append(f"device {index} uuid=GPU-{UUID}{index:04} name=Stand-in mem={80 << 30} pci=00000000:{pci.upper()} minor={minor} sms=132 mig={int(index in DIVIDED)}\n")
        for part in range(PARTS if index in DIVIDED else 0):
            lines.append(f"part {index} {part} uuid=MIG-{UUID}{index:02}{part:02} mem=10200547328 sms=16 slices=1 gi={part} ci=0\n")
            for level, name in enumerate(("access", "ci0/access")):
                number = FIRST_MINOR + 100 * (index + 1) + 2 * part + level
                files[f"proc/driver/nvidia/capabilities/gpu{minor}/mig/gi{part}/{name}"] = f"DeviceFileMinor: {number}\nDeviceFileMode: 292\n"
                nodes[f"/dev/nvidia-caps/nvidia-cap{number}"] = (CAPABILITIES, number)
    return files, "".join(lines), nodes


@contextlib.contextmanager
def machine(bench):
    """Environment and configuration of a node with CUDA devices, two of them divided, and two made-up ones; and what lets a CUDA device fail."""
    place = bench.agent.place.folder("accelerators")
    library, devices, mock = place / "libnvidia-ml.so.1", place / "devices", place / "mock-accelerator.toml"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, engine.ROOT / "tests/standin/nvml.c"], check=True)
    mock.write_text(MOCK)
    files, lines, wanted = driver()
    devices.write_text(lines)

    def fail(index):
        # Read at any time: whole or not at all.
        changed = devices.with_suffix(".new")
        changed.write_text(f"{lines}xid {index} 79 1\n")
        changed.replace(devices)

    for name, text in files.items():
        file = place / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    # The nodes are the host's own, as the engine sees them.
    with contextlib.suppress(FileExistsError):
        (place / "root/dev").symlink_to("/dev")
    nodes = []
    try:
        os.makedirs("/dev/nvidia-caps", exist_ok=True)
        for node, numbers in wanted.items():
            try:
                os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(*numbers))
                nodes.append(node)
            except FileExistsError:
                pass
            except PermissionError as error:
                raise Skipped(f"device nodes cannot be made here: {error}") from error
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
        yield environment, settings, fail
    finally:
        for node in nodes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(node)
        with contextlib.suppress(OSError):
            os.rmdir("/dev/nvidia-caps")


@check
async def accelerators_are_slots_of_the_manager(bench):
    """A node with real (stand-in) and made-up devices: in the agent list; a session with a part of a divided device, and one with a share of another, which fails under it; what is held is in the map of devices."""
    agent = bench.agent
    if agent.kind != "ours":
        raise Skipped("the stand-in driver and the settings are ours")
    text, env = agent.text, dict(bench.system.engine.env)
    with machine(bench) as (environment, settings, fail):
        agent.stop()
        agent.text = text.replace("allow-compute-plugins = []\n", "") + settings
        agent.write()
        bench.system.engine.env.update(environment)
        try:
            agent.start()

            async def announced(shares):
                async def look():
                    row = await bench.agent_row("status available_slots compute_plugins")
                    slots = json.loads(row["available_slots"])
                    return row if row["status"] == "ALIVE" and float(slots.get("cuda.shares", 0)) == shares else None

                return await eventually(f"the manager lists {shares} shares", look, SOON)

            whole = DEVICES - len(DIVIDED)
            row = await announced(whole)
            slots = json.loads(row["available_slots"])
            equal(float(slots[MIG]), float(PARTS * len(DIVIDED)), "parts of divided devices")
            equal(float(slots["rocm.device"]), 2.0, "made-up devices")
            assert {"cuda", "rocm"} <= set(json.loads(row["compute_plugins"])), row

            async def session(name, slots):
                async def asked():
                    return await bench.client.ComputeSession.get_or_create(
                        engine.PYTHON, name=name, resources={"cpu": 1, "mem": "512m", **slots}, enqueue_only=True, no_reuse=True
                    )

                # The manager looks at the slots it knows once a minute.
                bench.sessions[name] = await eventually("the manager knows the slot", asked, SOON, every=3)
                row = await bench.session_is(name, "RUNNING")
                occupied = json.loads(row["containers"][0]["occupied_slots"])
                for slot, amount in slots.items():
                    equal(float(occupied[slot]), float(amount), f"{slot} of the session")
                return await bench.shell(name, "env; ls /dev /dev/nvidia-caps 2>&1; true")

            async def held(said, kind, amount):
                """The number of the device that a session says it has, once the manager shows it, and nothing else, as held."""
                (device,) = set(re.findall(f"{kind}-({UUID}[0-9]+)", said))

                async def mapped():
                    # The manager asks the agent some time later, and keeps what it is told.
                    await bench.query("mutation($id: String!) { rescan_gpu_alloc_maps(agent_id: $id) { task_id } }", id=AGENT_ID)
                    return (await bench.agent_row("gpu_alloc_map"))["gpu_alloc_map"] == {device: amount}

                await eventually(f"{amount} of {device} is mapped", mapped, SOON, every=0.5)
                return int(device.removeprefix(UUID))

            said = await session("part", {MIG: "1"})
            assert "GPU_COUNT=1" in said and "CUDA_VISIBLE_DEVICES=MIG-" in said, said
            equal(said.count("nvidia-cap9"), 2, f"nodes of the part in {said}")
            await held(said, "MIG", 1.0)
            await bench.destroy("part")

            said = await session("shares", {"cuda.shares": "0.5"})
            assert "GPU_COUNT=1" in said and "GPU_CONFIG=0:40g" in said and f"nvidia{FIRST_MINOR}"[:-1] in said, said
            assert "nvidia-cap9" not in said, said
            # The device fails. A manager that saw more held than announced, of any slot, would start nothing here any more.
            fail(await held(said, "GPU", 0.5))
            await announced(whole - 1 + 0.5)
            said = await session("beside", {})
            assert "GPU_COUNT=0" in said and "NVIDIA_VISIBLE_DEVICES=void" in said, said
            await bench.session_is("shares", "RUNNING")
            await bench.destroy("beside")
            await bench.destroy("shares")
            await announced(whole - 1)
        finally:
            agent.stop()
            agent.text = text
            agent.write()
            bench.system.engine.env.clear()
            bench.system.engine.env.update(env)
            agent.start()
    await bench.agent_is("ALIVE")
