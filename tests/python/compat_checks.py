"""What an operator and his users do, one step after another, and what they must see."""

import asyncio
import contextlib
import json
import os
import signal
import tarfile
import tempfile
import uuid
from pathlib import Path

import aiohttp
from ai.backend.client.config import APIConfig
from ai.backend.client.exceptions import BackendAPIError
from ai.backend.client.request import Request
from ai.backend.client.session import AsyncSession

from recording import START, STOP, Recorder, unexpected
from stack import engine
from stack.agents import AGENT_ID
from stack.manager import ADMIN_KEY, ADMIN_SECRET, DOMAIN, GROUP
from stack.place import answers, eventually
from stack.proxy import AppProxy

CHECKS = {}
VECTORS = engine.ROOT / "tests/vectors/compat"
# What is compared with the original step by step; each is the name of a session of one of the checks.
SCENARIOS = (START, "recorded", "batch-good", "batch-bad", "dying", "cluster", "committed", "pulled", "unpulled", "broken", STOP)
MIB = 1 << 20
# From a request to what it leads to; the scheduler works by ticks, and another one may own the cores.
SOON = 300


class Skipped(Exception):
    pass


def check(function):
    CHECKS[function.__name__] = function
    return function


def equal(found, expected, what):
    assert found == expected, f"{what}: {found!r}, expected {expected!r}"


class Bench:
    """The client, and the sessions made so far."""

    def __init__(self, system, agent, record=None):
        self.system, self.agent, self.record = system, agent, record
        self.proxy = AppProxy(system.proxy_port)
        self.sessions = {}
        self.notes = {}

    async def open(self):
        await self.proxy.start()
        config = APIConfig(endpoint=self.system.endpoint, endpoint_type="api", domain=DOMAIN, group=GROUP, access_key=ADMIN_KEY, secret_key=ADMIN_SECRET, announcement_handler=lambda _text: None)
        self.client = AsyncSession(config=config)
        await self.client.__aenter__()

        self.recorder = Recorder(self.system, self.agent)
        await self.recorder.start()

    async def close(self):
        await self.recorder.stop()
        for name in list(self.sessions):
            with contextlib.suppress(Exception):
                await self.sessions[name].destroy(forced=True)
        with contextlib.suppress(Exception):
            await self.client.__aexit__(None, None, None)
        await self.proxy.close()

    async def recover(self):
        """After a failed check: what it has left must not take the cores of the next one."""
        for name in [name for name in self.sessions if name != "interactive"]:
            with contextlib.suppress(Exception):
                await self.sessions.pop(name).destroy(forced=True)
        with contextlib.suppress(Exception):
            await eventually("the cores are free", self._others_are_gone, 60)

    async def _others_are_gone(self):
        slots = json.loads((await self.agent_row())["occupied_slots"])
        return float(slots.get("cpu", 0)) <= len(self.sessions)

    async def query(self, text, **variables):
        return await self.client.Admin.query(text, variables)

    async def agent_row(self, fields="status available_slots occupied_slots"):
        found = await self.query(f"query($id: String!) {{ agent(agent_id: $id) {{ {fields} }} }}", id=AGENT_ID)
        return found["agent"]

    async def agent_is(self, status):
        async def look():
            row = await self.agent_row("status")
            return row if row and row["status"] == status else row and None

        return await eventually(f"the agent is {status}", look, SOON)

    async def session_row(self, name):
        fields = "status status_info status_data result containers { kernel_id cluster_hostname status status_info status_data container_id live_stat last_stat occupied_slots }"
        found = await self.query(f"query($id: UUID!) {{ compute_session(id: $id) {{ {fields} }} }}", id=str(self.sessions[name].id))
        return found["compute_session"]

    async def session_is(self, name, status, limit=SOON):
        async def look():
            row = await self.session_row(name)
            if row["status"] in ("ERROR", "CANCELLED", "TERMINATED") and row["status"] != status:
                raise AssertionError(f"{name} is {row}")
            return row if row["status"] == status else None

        return await eventually(f"session {name} is {status}", look, limit)

    async def create(self, name, image, *, cpu=1, mem=512, **more):
        await self.recorder.enter(name)
        session = await self.client.ComputeSession.get_or_create(image, name=name, resources={"cpu": cpu, "mem": f"{mem}m"}, enqueue_only=True, no_reuse=True, **more)
        await self.recorder.enter(name, session.id)
        self.sessions[name] = session
        return session

    async def execute(self, name, code="", mode="query", opts=None):
        """Runs to its end; the console's text, and the last answer."""
        session, run, text = self.sessions[name], uuid.uuid4().hex, []
        while True:
            # The client's own `execute` names the run `runId`, which this manager doesn't read: no run could be continued.
            request = Request("POST", f"/session/{session.session_identifier}")
            request.set_json({"mode": mode, "code": code, "run_id": run, "options": opts})
            async with request.fetch() as reply:
                answer = (await reply.json())["result"]
            text += [data for kind, data in answer["console"] if kind in ("stdout", "stderr")]
            if answer["status"] == "finished":
                return "".join(text), answer
            assert answer["status"] in ("continued", "build-finished", "clean-finished"), answer
            mode, code, opts = "continue", "", None

    async def shell(self, name, line):
        """A command line, by way of two queries: the original loses output that comes between two polls."""
        ran = await self.execute(name, f"import subprocess\nsaid = subprocess.run({line!r}, shell=True, text=True, stdout=-1, stderr=-2).stdout")
        text, told = await self.execute(name, "print(said, end='')")
        assert text, f"{line} said nothing: {ran}, then {told}"
        return text

    async def destroy(self, name):
        await self.recorder.leavings()
        await self.recorder.asked("destroy", name)
        await self.sessions[name].destroy()
        row = await self.session_is(name, "TERMINATED")
        del self.sessions[name]
        await self.recorder.enter("between sessions")
        return row

    def containers(self, session=None):
        """What the engine runs of the agent's kernels."""
        return self.system.engine.containers("label=ai.backend.kernel-id", *([f"label=ai.backend.session-id={session}"] if session else []))


@check
async def the_agent_is_alive_with_the_machines_slots(bench):
    # The recorder works meanwhile.
    await asyncio.to_thread(bench.agent.start)
    await bench.agent_is("ALIVE")
    row = await bench.agent_row("available_slots occupied_slots region architecture version compute_plugins addr")
    slots = json.loads(row["available_slots"])
    equal(int(slots["cpu"]), len(os.sched_getaffinity(0)), "cpu")
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")).split()[1]) << 10
    assert abs(total - (1 << 30) - int(slots["mem"])) < 64 * MIB, f"mem: {slots['mem']} of {total}"
    equal(row["region"], "local", "region")
    equal(row["architecture"], os.uname().machine, "architecture")
    equal(row["addr"], f"tcp://127.0.0.1:{bench.agent.rpc_port}", "address")
    assert {"cpu", "mem"} <= set(json.loads(row["compute_plugins"])), row


@check
async def its_images_are_known_to_the_manager(bench):
    async def installed():
        found = await bench.query(
            "query($name: String!, $arch: String!) { image(reference: $name, architecture: $arch) { installed installed_agents } }",
            name=engine.PYTHON, arch=os.uname().machine,
        )
        return found["image"]["installed"] and AGENT_ID in found["image"]["installed_agents"]

    await eventually("the image counts as installed", installed, SOON)


@check
async def a_session_starts(bench):
    await bench.client.VFolder.create("data")
    # The storage proxy runs as root here, kernels as somebody else.
    for path in bench.system.volume.glob("**/"):
        path.chmod(0o777)
    await bench.create("interactive", engine.PYTHON, mounts=["data"], envs={"GREETING": "hello"})
    row = await bench.session_is("interactive", "RUNNING")
    (container,) = row["containers"]
    equal(json.loads(container["occupied_slots"])["cpu"], "1", "slots of the kernel")
    equal(bench.containers(bench.sessions["interactive"].id), [container["container_id"]], "containers")
    slots = json.loads((await bench.agent_row())["occupied_slots"])
    equal(slots["cpu"], "1", "occupied slots of the agent")


@check
async def code_runs_and_keeps_its_variables(bench):
    text, answer = await bench.execute("interactive", "import os\nn = 40\nprint(os.environ['GREETING'], n + 2)")
    equal(text, "hello 42\n", "console")
    text, _ = await bench.execute("interactive", "print(n + 1)")
    equal(text, "41\n", "console")
    if bench.agent.kind == "python":
        # It may lose what comes between two polls of such a run, which then goes on for ever.
        return
    text, answer = await bench.execute("interactive", "import time; time.sleep(5); print('late')")
    assert text == "late\n", (text, answer)
    text, answer = await bench.execute("interactive", mode="batch", opts={"exec": "echo out; echo err >&2; exit 3"})
    assert "out\n" in text and "err\n" in text, text
    equal(answer["exitCode"], 3, "exit code")


@check
async def a_vfolder_is_mounted(bench):
    text, _ = await bench.execute("interactive", "open('/home/work/data/written', 'w').write('by the session'); print('done')")
    equal(text, "done\n", "console")
    found = list(bench.system.volume.glob("**/written"))
    assert len(found) == 1 and found[0].read_text() == "by the session", found


@check
async def the_storage_proxy_tells_of_the_folder(bench):
    if bench.agent.kind == "python":
        raise Skipped("the Python agent does not ask the storage proxy")

    async def told():
        shown = json.loads(await asyncio.to_thread(bench.agent.command, "kernel", "folders", "--output", "json"))
        found = [it for it in shown["folders"] if it["name"] == "data" and it["files"] == 1]
        return found and shown["volumes"] and shown

    shown = await eventually("usage of the folder", told, SOON)
    (folder,), (volume,) = shown["folders"], shown["volumes"]
    equal((folder["volume"], folder["used_bytes"], folder["error"]), ("volume1", len("by the session"), None), "the folder")
    # The plain file system has no quota, and says so.
    equal((folder["quota"]["limit_bytes"], folder["quota"]["error"]), (None, None), "its quota")
    assert folder["quota"]["age_s"] is not None and folder["quota"]["scope"].startswith("user:"), folder
    equal(volume["health"], "healthy", "the volume")
    space = os.statvfs(bench.system.volume)
    equal(volume["capacity_bytes"], space.f_frsize * space.f_blocks, "its size")
    equal(shown["storage_proxy"]["without_answer"], 0, "questions without an answer")


@check
async def the_watcher_obeys_the_manager(bench):
    if bench.agent.kind == "python":
        raise Skipped("its watcher needs sudo and systemd")
    programs = bench.system.place.folder("watcher-programs")
    systemctl = programs / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$*" >>{programs}/calls\ncase $1 in is-active) echo active ;; show) echo /usr/bin/bai-agent ;; esac\n')
    systemctl.chmod(0o755)

    async def ask(method, path):
        request = Request(method, path, params={"agent_id": AGENT_ID} if method == "GET" else None)
        if method == "POST":
            request.set_json({"agent_id": AGENT_ID})
        # This manager closes its connection to the watcher before it reads the answer, so it answers 500 whatever that was.
        try:
            async with request.fetch() as reply:
                return await reply.json()
        except BackendAPIError as error:
            equal(error.status, 500, path)

    watcher = bench.agent.watcher(programs)
    try:
        await eventually("the watcher listens", lambda: asyncio.to_thread(answers, bench.agent.watcher_port), SOON)
        assert await ask("GET", "/resource/watcher") in (None, {"agent-status": "active", "watcher-status": "active"})
        for action in ("start", "stop", "restart"):
            assert await ask("POST", f"/resource/watcher/agent/{action}") in (None, {"result": "ok"}), action
        unit = "backendai-agent.service"
        calls = (programs / "calls").read_text().splitlines()
        first = [f"show --property=ExecStart --value -- {unit}", f"is-active -- {unit}"]
        equal(calls, [*first, *(f"--no-ask-password {action} -- {unit}" for action in ("start", "stop", "restart"))], "calls")
    finally:
        bench.system.place.stop(watcher)


@check
async def files_go_in_and_come_out(bench):
    session = bench.sessions["interactive"]
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "up", "note.txt")
        source.parent.mkdir()
        source.write_text("from the client")
        await session.upload([source], basedir=source.parent)
        text, _ = await bench.execute("interactive", "print(open('/home/work/note.txt').read())")
        equal(text, "from the client\n", "an uploaded file inside")
        listed = await session.list_files(".")
        names = {item["filename"] for item in json.loads(listed["files"])}
        assert "note.txt" in names, listed
        await session.download(["note.txt"], dest=directory)
        equal(Path(directory, "note.txt").read_text(), "from the client", "a downloaded file")


@check
async def logs_are_shown(bench):
    logs = await bench.sessions["interactive"].get_logs()
    assert isinstance(logs["result"]["logs"], str) and logs["result"]["logs"], logs


@check
async def completions_are_offered(bench):
    answer = await bench.sessions["interactive"].complete("import o", {"row": 1, "col": 8, "line": "import o", "post": ""})
    # This release's runner has no suggestions of its own for Python; that it was asked and has answered is told.
    assert answer["result"] == {"status": "finished", "error": None, "suggestions": []}, answer


@check
async def a_service_is_reached_through_its_port(bench):
    told = await bench.sessions["interactive"].start_service("web")
    assert told["token"], told
    address = bench.notes["service"] = bench.proxy.told[-1]
    port = int(address["kernel_port"])
    assert bench.agent.first_port <= port < bench.agent.first_port + bench.agent.port_count, address
    async with aiohttp.ClientSession() as http:

        async def page():
            async with http.get(f"http://{address['kernel_host']}:{port}/", timeout=aiohttp.ClientTimeout(10)) as reply:
                return (await reply.text()).strip() == "python"

        await eventually("the service's page", page, SOON)


@check
async def statistics_reach_the_manager(bench):
    await bench.execute("interactive", "sum(range(10_000_000)); print()")

    async def measured():
        (container,) = (await bench.session_row("interactive"))["containers"]
        live = json.loads(container["live_stat"] or "{}")
        wanted = {"cpu_util", "cpu_used", "mem", "io_read", "io_write", "io_scratch_size", "net_rx", "net_tx"}
        assert wanted <= set(live), f"live_stat has {sorted(live)}"
        return float(live["cpu_used"]["current"]) > 100 and int(live["mem"]["current"]) > MIB and live

    live = await eventually("statistics of the kernel", measured, SOON)
    # The idle checker divides by what the kernel may use.
    equal(int(live["mem"]["capacity"]), 512 * MIB, "capacity of memory")

    async def node():
        row = await bench.agent_row("live_stat cpu_cur_pct mem_cur_bytes")
        live = json.loads(row["live_stat"])
        return {"cpu_util", "mem", "disk", "net_rx", "net_tx"} <= set(live["node"]) and "root" in live["devices"]["mem"] and row["mem_cur_bytes"] > MIB

    await eventually("statistics of the node", node, SOON)


@check
async def a_session_leaves_its_records(bench):
    """What the last check compares with the recording of the Python agent: here its statistics, a service, a restart."""
    await bench.create("recorded", engine.PYTHON, mem=256)
    await bench.session_is("recorded", "RUNNING")
    await bench.execute("recorded", "print('recorded')")
    reference = json.loads((VECTORS / "recording.json").read_text())

    async def measured():
        (container,) = (await bench.session_row("recorded"))["containers"]
        return "cpu_util" in json.loads(container["live_stat"] or "{}")

    async def complete():
        # Records come and go; each is looked for until it was seen.
        await bench.recorder.leavings()
        lying = {path for path in reference["types"] if path.startswith(("etcd ", "redis ")) and not path.startswith("redis 0 kernel.UUID.commit")}
        return bench.record or lying <= bench.recorder.types.keys()

    # What is missing is told by the comparison.
    with contextlib.suppress(TimeoutError):
        await eventually("statistics", measured, 60)
    with contextlib.suppress(TimeoutError):
        await eventually("all that the original leaves", complete, 90)
    await bench.recorder.asked("start a service")
    await bench.sessions["recorded"].start_service("web")
    await bench.recorder.asked("restart")
    await bench.sessions["recorded"].restart()
    await bench.destroy("recorded")

    async def told():
        return bench.recorder.seen("recorded", "kernel_terminated") and bench.recorder.seen("recorded", "do_sync_kernel_logs")

    await eventually("the last events", told, SOON)


@check
async def a_killed_agent_is_lost_and_comes_back_with_its_session(bench):
    (container,) = bench.containers(bench.sessions["interactive"].id)
    if bench.agent.kind == "ours":
        bench.agent.stop(signal.SIGKILL, only="agent")
    else:
        bench.agent.stop(signal.SIGKILL)
    await bench.agent_is("LOST")
    row = await bench.session_row("interactive")
    equal(row["status"], "RUNNING", "the session meanwhile")
    if bench.agent.kind == "ours":
        # The service goes on without the agent.
        address = bench.notes["service"]
        async with aiohttp.ClientSession() as http, http.get(f"http://{address['kernel_host']}:{address['kernel_port']}/") as reply:
            equal((await reply.text()).strip(), "python", "the service of a node without agent")
        bench.agent.start_control()
    else:
        bench.agent.start()
    await bench.agent_is("ALIVE")
    again = lambda: bench.execute("interactive", "print(n + 2)")
    # The original says ALIVE before it knows its kernels.
    text, _ = await (again() if bench.agent.kind == "ours" else eventually("the first execution", again, 60))
    equal(text, "42\n", "a variable of before")
    equal(bench.containers(bench.sessions["interactive"].id), [container], "containers")


@check
async def a_session_is_restarted(bench):
    session = bench.sessions["interactive"]
    (before,) = bench.containers(session.id)
    await session.restart()
    await bench.session_is("interactive", "RUNNING")
    (after,) = bench.containers(session.id)
    assert after != before, "the container is the same"
    text, answer = await bench.execute("interactive", "print('n' in globals(), open('/home/work/note.txt').read())")
    assert text == "False from the client\n", (text, answer)


@check
async def a_session_is_destroyed(bench):
    session = bench.sessions["interactive"]
    row = await bench.destroy("interactive")
    (kernel,) = row["containers"]
    equal(kernel["status"], "TERMINATED", "the kernel")
    equal(row["status_info"], "user-requested", "the reason")
    await eventually("its container is removed", lambda: asyncio.to_thread(lambda: not bench.containers(session.id)), SOON)

    async def given_back():
        slots = json.loads((await bench.agent_row())["occupied_slots"])
        return float(slots.get("cpu", 0)) == 0

    await eventually("its slots are given back", given_back, SOON)


@check
async def a_kernel_that_died_by_itself_shows_how(bench):
    """This manager takes the end of a kernel only once it terminates the session: it is told again then."""
    session = await bench.create("dying", engine.PYTHON, mem=256)
    await bench.session_is("dying", "RUNNING")
    (container,) = bench.containers(session.id)
    docker = bench.system.engine.docker
    await bench.recorder.asked("nothing: it is killed")
    await asyncio.to_thread(docker, "kill", "--signal", "KILL", container)

    async def removed():
        return await asyncio.to_thread(lambda: container not in docker("ps", "--all", "--quiet", "--no-trunc"))

    await eventually("its container is removed", removed, SOON)
    equal((await bench.session_row("dying"))["status"], "RUNNING", "the session before it is destroyed")
    row = await bench.destroy("dying")
    (kernel,) = row["containers"]
    if bench.agent.kind != "ours":
        # It says already-terminated, and -1.
        return
    equal((kernel["status"], kernel["status_info"]), ("TERMINATED", "self-terminated"), "the kernel")
    equal(json.loads(kernel["status_data"])["kernel"]["exit_code"], 137, "the exit code")


@check
async def batch_sessions_succeed_and_fail(bench):
    # With the original a job of a moment ends before its session is said to run, which then runs for ever.
    pause = "" if bench.agent.kind == "ours" else "sleep 3; "
    batches = (("batch-good", pause + "echo computed; exit 0", "SUCCESS"), ("batch-bad", pause + "echo wrong; exit 3", "FAILURE"))
    for name, line, result in batches:
        await bench.create(name, engine.APP, mem=256, type_="batch", startup_command=line)
        row = await bench.session_is(name, "TERMINATED")
        equal(row["result"], result, f"the result of {name}")
        session = bench.sessions.pop(name)
        word = line.split("echo ")[1].split(";")[0]

        async def logs():
            found = await session.get_logs()
            return word in found["result"]["logs"]

        await eventually(f"the logs of {name}", logs, SOON)


@check
async def a_batch_session_whose_kernel_dies_fails(bench):
    """This manager takes no end of a kernel whose session runs: without a result that would run for ever."""
    if bench.agent.kind != "ours":
        raise Skipped("with the original it stays RUNNING for ever")
    session = await bench.create("batch-killed", engine.APP, mem=256, type_="batch", startup_command="sleep 1000")
    await bench.session_is("batch-killed", "RUNNING")
    (container,) = bench.containers(session.id)
    await asyncio.to_thread(bench.system.engine.docker, "kill", "--signal", "KILL", container)
    row = await bench.session_is("batch-killed", "TERMINATED")
    equal(row["result"], "FAILURE", "the result")
    equal([kernel["status"] for kernel in row["containers"]], ["TERMINATED"], "its kernel")
    del bench.sessions["batch-killed"]
    await bench.recorder.enter("between sessions")


@check
async def a_cluster_session_talks_over_ssh(bench):
    if len(os.sched_getaffinity(0)) < 2:
        raise Skipped("a cluster of two kernels needs two cores")
    await bench.create("cluster", engine.PYTHON, mem=384, cluster_size=2)
    row = await bench.session_is("cluster", "RUNNING")
    equal(sorted(item["cluster_hostname"] for item in row["containers"]), ["main1", "sub1"], "hosts")
    text = await bench.shell("cluster", "ssh -o ConnectTimeout=20 sub1 hostname; echo exit code $?")
    assert "sub1\n" in text, text
    text = await bench.shell("cluster", 'echo "$BACKENDAI_CLUSTER_HOSTS $BACKENDAI_CLUSTER_SIZE"')
    hosts, size = text.split()
    # The manager names them in the order in which its database gives them.
    equal((sorted(hosts.split(",")), size), (["main1", "sub1"], "2"), "the environment of a cluster")
    await bench.destroy("cluster")


@check
async def a_session_is_committed(bench):
    await bench.create("committed", engine.APP, mem=256)
    await bench.session_is("committed", "RUNNING")
    # The engine has no order for images of the same second.
    images = lambda: sorted(bench.system.engine.docker("images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").splitlines())
    before = images()
    await bench.recorder.asked("commit")
    await bench.sessions["committed"].commit()

    async def written():
        for path in bench.agent.commits.glob("**/*.tar.gz"):
            with tarfile.open(path) as image:
                return "manifest.json" in image.getnames()

    await eventually("the commit's file", written, SOON)
    if bench.agent.kind == "ours":
        listed = lambda: images() == before
        await eventually("the engine has the images of before", lambda: asyncio.to_thread(listed), SOON)
    await bench.destroy("committed")
    # The original takes the name of its image away.
    await asyncio.to_thread(bench.system.engine.name_images)


@check
async def an_image_is_pulled_from_a_registry(bench):
    with bench.system.registry(engine.APP) as name:
        await bench.create("pulled", name, mem=256)
        row = await bench.session_is("pulled", "RUNNING")
        assert name in bench.system.engine.docker("images", "--format", "{{.Repository}}:{{.Tag}}").split(), f"{name} is not in the engine; {row}"
        await bench.destroy("pulled")
        await asyncio.to_thread(bench.system.engine.docker, "rmi", "--no-prune", name)


@check
async def a_failed_pull_is_shown_with_its_reason(bench):
    """The manager knows the image; the engine has lost it and its registry doesn't exist."""
    docker = bench.system.engine.docker
    await asyncio.to_thread(docker, "rmi", "--no-prune", engine.BROKEN, engine.BROKEN.removeprefix("local/"))
    try:
        await bench.create("unpulled", engine.BROKEN, mem=256)

        async def shown():
            row = await bench.session_row("unpulled")
            return row["status"] == "CANCELLED" and row

        row = await eventually("the session is cancelled", shown, SOON)
        reason = [row["status_info"], *(item["status_info"] for item in row["containers"])]
        # The prefix is the manager's; what follows is the agent's.
        own = "is registered as local and is not on this node" if bench.agent.kind == "ours" else ""
        assert any(word and word.startswith("Image pull failed: ") and own in word for word in reason), f"no reason in {row}"
    finally:
        await asyncio.to_thread(bench.system.engine.name_images)
    del bench.sessions["unpulled"]


@check
async def a_failed_creation_leaves_nothing(bench):
    """The image is empty: its container can't run. (This manager drops the reason a creation answers with.)"""
    await bench.create("broken", engine.BROKEN, mem=256)

    async def creating():
        return (await bench.session_row("broken"))["status"] == "CREATING"

    await eventually("the creation", creating, SOON)
    await bench.sessions["broken"].destroy(forced=True)

    async def ended():
        return (await bench.session_row("broken"))["status"] in ("TERMINATED", "CANCELLED")

    await eventually("the session's end", ended, SOON)
    del bench.sessions["broken"]
    if bench.agent.kind != "ours":
        # Its scratch directory stays, and its container's name with it.
        return
    await eventually("nothing is left of it", lambda: asyncio.to_thread(lambda: not bench.containers()), SOON)
    left = [path.name for path in bench.agent.scratch.iterdir()]
    assert not left, f"scratch directories: {left}"


@check
async def an_agent_that_stops_says_so(bench):
    await bench.recorder.enter(STOP)
    await bench.recorder.asked("stop")
    await asyncio.to_thread(bench.agent.stop)
    await bench.agent_is("TERMINATED")


@check
async def what_it_leaves_is_what_the_original_leaves(bench):
    """Steps, names and types of all that was left by the sessions before, against the recording of the Python agent."""
    found = await bench.recorder.recording(SCENARIOS)
    await bench.recorder.stop()
    await asyncio.to_thread(bench.agent.stop)
    await asyncio.to_thread(bench.agent.start)
    await bench.agent_is("ALIVE")
    if bench.record:
        bench.record.write_text(json.dumps(found, indent=1) + "\n")
        return
    if bench.agent.kind != "ours":
        raise Skipped("the recording is this agent's own")
    reference = json.loads((VECTORS / "recording.json").read_text())
    lines = unexpected(reference, found, (VECTORS / "differences.txt").read_text())
    assert not lines, "not as tests/vectors/compat/differences.txt says:\n" + "\n".join(lines)
