"""What the published Python agent and the engine spend on the statistics of kernels.

Usage: bench_stats.py [--kernels N] [--seconds S] --out FILE

CPU of the agent with all its processes, and of the engine with all that it starts but for the containers, is taken over S seconds
without kernels and with N idle ones; the difference, per kernel and round of statistics (every 5 seconds), is the figure. All that the
agent does periodically for a kernel is in it, not only its statistics.
"""

import argparse
import asyncio
import json
import os
import pathlib
import sys
import time

sys.dont_write_bytecode = True

from ai.backend.common.types import AgentId
from ai.backend.manager.clients.agent.client import AgentClient

from bench_agent import Bench
from name_spaces import INSIDE, enter
from node_peer import cache_for
from stack import engine
from stack.agents import Agent
from stack.manager import System
from stack.place import Place

INTERVAL = 5.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    enter(__file__, sys.argv[1:], prepare=lambda: engine.have_images(Place))
    place = Place(os.environ[INSIDE])
    try:
        engine_group, agent_group = (place.group(name) for name in ("engine", "python"))
        place.groups.update(dockerd=engine_group, agent=agent_group)
        system = System(place, manager=False)
        agent = Agent(system, "python", port_count=300)
        bench = Bench.__new__(Bench)
        bench.system = system
        agent.start()

        def used():
            """Cores used while nothing is asked."""
            look = lambda: (time.monotonic(), agent_group.cpu(), engine_group.cpu())
            time.sleep(10)
            before = look()
            time.sleep(options.seconds)
            after = look()
            return [(late - early) / (after[0] - before[0]) for early, late in zip(before[1:], after[1:])]

        without = used()
        client = AgentClient(cache_for(f"127.0.0.1:{agent.rpc_port}"), AgentId("i-agent"))
        asyncio.run(bench.create(client, options.kernels, []))
        with_kernels = used()
        share = [(more - less) * 1000 * INTERVAL / options.kernels for less, more in zip(without, with_kernels)]
        options.out.write_text(json.dumps({
            "kernels": options.kernels,
            "seconds": options.seconds,
            "ms_per_container_and_sample": sum(share),
            "agent_ms": share[0],
            "engine_ms": share[1],
            "cores_without": without,
            "cores_with": with_kernels,
        }) + "\n")
    finally:
        place.close()


if __name__ == "__main__":
    main()
