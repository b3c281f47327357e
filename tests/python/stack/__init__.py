"""A whole Backend.AI system of one machine: stores, storage proxy, manager, engine, and one agent, all on loopback.

Everything lives in one temporary directory (`place`), is started by hand and stopped by pid, the last one first.
"""
