"""An unmodified manager drives an agent through its public API, as its users do.

Usage: compat.py [--agent ours|python] [--record FILE] [--keep] [CHECK...]

Brings up PostgreSQL, Redis, etcd, a Docker engine, the published storage proxy and manager, and the agent, in name spaces of
their own (network, processes, mounts), so that nothing of the machine is in the way and nothing is left. Prints a line per
check; the exit status tells whether all passed. `--agent python` runs the same checks against the published Python agent;
`--record` writes what its session leaves on the bus, in etcd and in Redis (tests/vectors/compat).
"""

import argparse
import asyncio
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import time
import traceback

sys.dont_write_bytecode = True

# These add their checks.
import compat_exchange  # noqa: F401, I001
import compat_accelerators  # noqa: F401
from compat_checks import CHECKS, Bench, Skipped
from stack import engine
from stack.agents import Agent
from stack.manager import System
from stack.place import Failed, Place, command

# No check waits for longer.
LIMIT = 900


def enter(program, argv):
    """Prepares what needs the network, then goes on in name spaces of its own: returns only inside of them."""
    if "BAI_COMPAT_INSIDE" in os.environ:
        command(["ip", "link", "set", "lo", "up"])
        return
    if os.getuid() != 0:
        sys.exit("compat: needs root (name spaces, a Docker engine)")
    engine.have_images(Place)
    token = secrets.token_hex(4)
    inner = subprocess.Popen(
        ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--", sys.executable, program, *argv],
        env={**os.environ, "BAI_COMPAT_INSIDE": token},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )

    def ask_to_end(_number, _frame):
        # The inner program ends when this pipe does; its first process takes all others of its name space along.
        inner.stdin.close()
        signal.alarm(120)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask_to_end)
    signal.signal(signal.SIGALRM, lambda _number, _frame: inner.kill())
    result = inner.wait()
    if "--keep" not in argv:
        Place.remove(token)
    sys.exit(result)


async def run(options):
    loop, main = asyncio.get_running_loop(), asyncio.current_task()

    def end():
        loop.remove_reader(sys.stdin.fileno())
        main.cancel()

    loop.add_reader(sys.stdin.fileno(), end)
    started = time.monotonic()
    place = Place(os.environ["BAI_COMPAT_INSIDE"], keep=options.keep)
    passed, failed = [], []
    try:
        system = await asyncio.to_thread(System, place)
        print(f"the system is up after {time.monotonic() - started:.0f} s", flush=True)
        agent = Agent(system, options.agent, storage=True)
        bench = Bench(system, agent, options.record)
        await bench.open()
        try:
            for name, check in CHECKS.items():
                if options.checks and name not in options.checks:
                    continue
                from_ = time.monotonic()
                try:
                    async with asyncio.timeout(LIMIT):
                        await check(bench)
                    passed.append(name)
                    print(f"ok   {name} ({time.monotonic() - from_:.1f} s)", flush=True)
                except Skipped as reason:
                    print(f"SKIP {name}: {reason}", flush=True)
                except Exception:
                    failed.append(name)
                    await bench.recover()
                    print(f"FAIL {name} ({time.monotonic() - from_:.1f} s)\n{traceback.format_exc()}\nThe agent's log ends:\n{agent.log}\n", flush=True)
        finally:
            await bench.close()
            agent.stop()
    except Failed as error:
        failed.append("start")
        print(f"FAIL start\n{error}", flush=True)
    finally:
        if failed and not place.keep:
            save_logs(place)
        await asyncio.to_thread(place.close)
    print(f"compat with the {options.agent} agent, {time.monotonic() - started:.0f} s: {len(passed)} passed, {len(failed)} failed", flush=True)
    return 1 if failed or not passed else 0


def save_logs(place):
    """The logs of a run with failures outlive it."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or engine.ROOT / "target") / "compat-logs"
    target.mkdir(parents=True, exist_ok=True)
    for log in (place.directory / "log").glob("*.log"):
        (target / log.name).write_bytes(log.read_bytes())
    print(f"logs: {target}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--agent", choices=["ours", "python"], default="ours")
    parser.add_argument("--record", type=pathlib.Path)
    parser.add_argument("--keep", action="store_true", help="leave the directory with logs and configuration")
    parser.add_argument("checks", nargs="*", metavar="CHECK")
    options = parser.parse_args()
    enter(__file__, sys.argv[1:])
    sys.exit(asyncio.run(run(options)))


if __name__ == "__main__":
    main()
