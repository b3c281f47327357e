"""Lets the manager's own checker of idle sessions judge kernels by the records in a Redis, and prints its answers as JSON.

Usage: idle_checker.py PORT CASES_JSON

CASES_JSON: {name: {"kernels": [id, ...], "slots": {slot: amount}, "operator": "and" | "or", "thresholds": {resource: percent}}}.
The answer of a case is true for a session that lives on once more checks than fit its window were made.
"""

import asyncio
import json
import sys
import uuid
from datetime import datetime, timedelta, timezone

import ai.backend.manager.models  # noqa: F401 - first: the modules of the checker import each other
from ai.backend.common.clients.valkey_client.valkey_live.client import ValkeyLiveClient
from ai.backend.common.clients.valkey_client.valkey_stat.client import ValkeyStatClient
from ai.backend.common.types import ResourceSlot, ValkeyTarget
from ai.backend.manager import idle

INTERVAL = 0.01
CHECKS_IN_WINDOW = 5


class Rows:
    """The only question the checker asks of the database: which kernels a session of several has."""

    def __init__(self, kernels):
        self.kernels = kernels

    async def execute(self, _query):
        return self

    def fetchall(self):
        return [{"id": kernel} for kernel in self.kernels]


async def lives_on(checker, case):
    now = datetime.now(timezone.utc)
    slots = ResourceSlot.from_json(case["slots"])
    kernel = {
        "id": case["kernels"][0],
        "session_id": str(uuid.uuid4()),
        "cluster_size": len(case["kernels"]),
        "created_at": now - timedelta(hours=1),
        "occupied_slots": slots,
        "requested_slots": slots,
    }
    thresholds = {name: {"average": average} for name, average in case["thresholds"].items()}
    await checker.populate_config({
        "time-window": f"{INTERVAL * CHECKS_IN_WINDOW}",
        "initial-grace-period": "0",
        "thresholds-check-operator": case["operator"],
        "resource-thresholds": thresholds,
    })
    answer = True
    for _ in range(CHECKS_IN_WINDOW * 3):
        answer = await checker.check_idleness(kernel, Rows(case["kernels"]), {"idle_timeout": -1})
        await asyncio.sleep(INTERVAL * 1.5)
    return answer


async def main():
    target = ValkeyTarget(addr=f"127.0.0.1:{sys.argv[1]}")
    live = await ValkeyLiveClient.create(target, db_id=1, human_readable_name="live")
    stat = await ValkeyStatClient.create(target, db_id=0, human_readable_name="stat")

    async def now(_connection):
        return datetime.now(timezone.utc)

    idle.get_db_now = now
    idle.IdleCheckerHost.check_interval = INTERVAL
    checker = idle.UtilizationIdleChecker(idle.IdleCheckerArgs(None, live, stat))
    answers = {}
    for name, case in json.loads(sys.argv[2]).items():
        answers[name] = await lives_on(checker, case)
    print(json.dumps(answers))
    await live.close()
    await stat.close()


asyncio.run(main())
