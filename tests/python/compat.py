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
import sys
import time
import traceback

sys.dont_write_bytecode = True

# These add their checks.
import compat_exchange  # noqa: F401, I001
import compat_accelerators  # noqa: F401
from compat_checks import CHECKS, Bench, Skipped
from name_spaces import enter
from stack import engine
from stack.agents import Agent
from stack.manager import System
from stack.place import Failed, Place

# No check waits for longer.
LIMIT = 900


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
    # The loop below looks at standard input itself.
    enter(__file__, sys.argv[1:], prepare=lambda: engine.have_images(Place), interrupt=False)
    sys.exit(asyncio.run(run(options)))


if __name__ == "__main__":
    main()
