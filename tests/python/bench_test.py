"""Tests of what the benches in Python are made of; needs no published package and takes seconds (root, for name spaces).

Usage: bench_test.py
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest

sys.dont_write_bytecode = True

import bench_figures
from stack.place import Place, listening_ports

ROUNDS = {
    "calls_per_s_16": [9000.0, 10000.0, 11000.0],
    "cpu_per_call_us": [100.0, 140.0, 120.0],
    "cpu_per_call_1_us": [300.0, 280.0, 290.0],
    "rtt_us": [[300, 310, 5000], [290], [305, 295]],
    "connect_and_ping_us": [[700], [690], [710]],
    "rss_bytes": [400e6, 380e6, 390e6],
    "ready_s": [3.5, 3.4, 3.6],
    "with_agent_cpu_10": [0.052, 0.050, 0.054],
    "engine_alone_cpu_10": [0.010, 0.011, 0.012],
    "create_to_start_ms": [900.0, 910.0],
    "create_to_served_ms": [950.0, 960.0],
    "engine_create_to_start_ms": [500.0, 530.0],
}
CALLS = {"calls_per_s_16", "cpu_per_call", "cpu_per_call_1", "rtt_p50", "connect_and_ping_p50"}


def raw(**ours):
    scaled = {name: [[value / 4 for value in item] if isinstance(item, list) else item / 4 for item in items] for name, items in ROUNDS.items()}
    bare = {name: ROUNDS[name] for name in ("calls_per_s_16", "cpu_per_call_us", "cpu_per_call_1_us", "rtt_us", "connect_and_ping_us")}
    return {"python": ROUNDS, "ours": {**scaled, "with_agent_cpu_10": [0.013, 0.0115, 0.014], "engine_alone_cpu_10": ROUNDS["engine_alone_cpu_10"], **ours}, "bare": bare}


class Figures(unittest.TestCase):
    def test_all_keys_and_quartiles(self):
        found = bench_figures.report(raw(), [10], 60.0)
        self.assertEqual(set(found["ratios"]), CALLS | {"rss", "ready", "idle_cpu_10", "create_beyond_engine_32_ports_ms"})
        self.assertEqual(set(found["quartiles"]), set(found["ratios"]))
        self.assertEqual(set(found["floor"]), CALLS)
        self.assertEqual((found["notes"], found["problems"]), ([], []))
        self.assertAlmostEqual(found["ratios"]["rtt_p50"], 0.25)
        # 3/42, 0.5/39, 2/42: each round against the same round.
        self.assertAlmostEqual(found["ratios"]["idle_cpu_10"], 2 / 42)
        low, middle, high = found["quartiles"]["idle_cpu_10"]
        self.assertTrue(0.5 / 39 < low < middle < high < 3 / 42)
        self.assertAlmostEqual(found["ratios"]["create_beyond_engine_32_ports_ms"], (450 / 4 + 430 / 4) / 2)
        self.assertAlmostEqual(found["figures"]["python"]["idle_cpu_10_cores"][1], 0.042)

    def test_what_was_not_measured_is_left_out(self):
        found = bench_figures.report({"ours": {}, "python": {}}, [10, 50], 60.0)
        self.assertEqual((found["ratios"], found["floor"], found["problems"]), ({}, {}, []))

    def test_short_windows_make_no_idle_ratio_and_say_so(self):
        found = bench_figures.report(raw(), [10], 25.0)
        self.assertNotIn("idle_cpu_10", found["ratios"])
        self.assertEqual(len(found["notes"]), 1)
        self.assertEqual(found["problems"], [])

    def test_an_agent_that_gives_time_back_is_a_problem_and_no_perfect_figure(self):
        found = bench_figures.report(raw(with_agent_cpu_10=[0.009, 0.010, 0.012]), [10], 60.0)
        self.assertNotIn("idle_cpu_10", found["ratios"])
        self.assertEqual(len(found["problems"]), 1)
        self.assertIn("ours", found["problems"][0])

    def test_a_python_agent_without_cost_is_a_problem_and_no_silence(self):
        numbers = raw()
        numbers["python"] = {**ROUNDS, "with_agent_cpu_10": [0.052, 0.011, 0.054]}
        found = bench_figures.report(numbers, [10], 60.0)
        self.assertNotIn("idle_cpu_10", found["ratios"])
        self.assertIn("python", found["problems"][0])


class Measuring(unittest.TestCase):
    def test_ports_are_seen_as_soon_as_they_are_listened_on(self):
        with socket.socket() as listener, socket.socket(socket.AF_INET6) as other:
            for one, address in ((listener, "127.0.0.1"), (other, "::1")):
                one.bind((address, 0))
            ports = {listener.getsockname()[1], other.getsockname()[1]}
            self.assertFalse(ports & listening_ports())
            for one in (listener, other):
                one.listen()
            self.assertLessEqual(ports, listening_ports())
        self.assertFalse(ports & listening_ports())

    def test_a_group_counts_processes_that_have_ended(self):
        place = Place()
        try:
            group = place.group("worker")
            self.assertEqual(group.cpu(), 0.0)
            work = "import time\nwhile time.process_time() < 0.1: pass"
            # A child of the one that was put there.
            subprocess.run(group.within(["sh", "-c", '"$0" -c "$1"; true', sys.executable, work]), check=True)
            self.assertGreaterEqual(group.cpu(), 0.1)
            path = group.path
        finally:
            place.close()
        self.assertFalse(path.exists())


class Interruption(unittest.TestCase):
    PROGRAM = """
        import os, pathlib, subprocess, sys, time
        sys.path.insert(0, sys.argv[2])
        from name_spaces import enter
        enter(__file__, sys.argv[1:])
        out = pathlib.Path(sys.argv[1])
        try:
            (out / "inside").touch()
            subprocess.run(["sleep", "100"])
        finally:
            time.sleep(0.3)
            (out / "cleaned").touch()
    """

    def test_who_is_told_to_end_cleans_up_first_although_signals_were_blocked(self):
        with tempfile.TemporaryDirectory() as directory:
            out = pathlib.Path(directory)
            program = out / "program.py"
            program.write_text(textwrap.dedent(self.PROGRAM))
            here = str(pathlib.Path(__file__).resolve().parent)
            # As a bench that takes its signals itself starts it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            try:
                child = subprocess.Popen([sys.executable, program, out, here], stderr=subprocess.DEVNULL)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
            try:
                end = time.monotonic() + 30
                while not (out / "inside").exists() and time.monotonic() < end:
                    time.sleep(0.01)
                # Impatience changes nothing.
                for _ in range(3):
                    child.send_signal(signal.SIGTERM)
                    time.sleep(0.05)
                child.wait(30)
            finally:
                child.kill()
                child.wait()
            self.assertTrue((out / "cleaned").exists())
            self.assertNotIn(child.returncode, (0, -signal.SIGTERM))


if __name__ == "__main__":
    if os.getuid() != 0:
        sys.exit("bench_test.py: needs root (name spaces, cgroups)")
    unittest.main()
