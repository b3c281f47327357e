"""PostgreSQL, Redis (or Valkey) and etcd."""

import base64
import glob
import json
import os
import shutil
import signal
import urllib.request

from .place import Failed, answers, command, wait

PASSWORD = "compat-secret"
DATABASE = "backend"


class Postgres:
    """A server on a data directory of the run, fresh or copied from `template`."""

    def __init__(self, place, template=None):
        self.place = place
        self.bin, self.version = self.find()
        self.data = place.directory / "postgres"
        # The server refuses to run as root.
        self.drop = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.getuid() == 0 else []
        self.port = place.port()
        if template:
            command(["cp", "-a", "--reflink=auto", template, self.data])
        else:
            self.data.mkdir(mode=0o700)
            if self.drop:
                shutil.chown(self.data, "postgres", "postgres")
            secret = place.directory / "postgres.password"
            secret.write_text(PASSWORD)
            secret.chmod(0o644)
            command([*self.drop, f"{self.bin}/initdb", "-D", self.data, "-U", "postgres", f"--pwfile={secret}", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync"], cwd="/")
        self.start()
        if not template:
            self.sql(f"create database {DATABASE}", database="postgres")

    def start(self):
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": 256, "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        self.process = self.place.spawn("postgres", [*self.drop, f"{self.bin}/postgres", "-D", self.data, *(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))], cwd="/")
        wait("PostgreSQL answers", lambda: self._ready(), 180, self.process)

    def _ready(self):
        return answers(self.port) and self.sql("select 1", database="postgres", check=False).strip() == "1"

    def sql(self, text, database=DATABASE, check=True):
        return command([f"{self.bin}/psql", "-h", "127.0.0.1", "-p", self.port, "-U", "postgres", "-d", database, "-v", "ON_ERROR_STOP=1", "-qtAc", text], env={"PGPASSWORD": PASSWORD}, check=check, cwd="/")

    @staticmethod
    def find():
        """The directory of the programs and their version; Debian keeps them out of the path."""
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(path.split("/")[4]))
        initdb = shutil.which("initdb")
        if not found and not initdb:
            raise Failed("PostgreSQL is missing; deploy/setup test installs it")
        place = found[-1] if found else os.path.dirname(initdb)
        return place, command([f"{place}/postgres", "--version"]).strip()

    def stop(self):
        self.place.stop(self.process, signal.SIGINT, 30)


class Redis:
    def __init__(self, place):
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if not program:
            raise Failed("redis-server is missing; deploy/setup test installs it")
        self.port = place.port()
        self.address = f"127.0.0.1:{self.port}"
        self.process = place.spawn("redis", [program, "--port", self.port, "--bind", "127.0.0.1", "--dir", place.folder("redis"), "--save", "", "--appendonly", "no"])
        wait("Redis answers", lambda: answers(self.port), 180, self.process)


class Etcd:
    """The server, and its keys by the JSON gateway."""

    def __init__(self, place, namespace="compat"):
        self.namespace = namespace
        self.port, peer = place.port(), place.port()
        client, peers = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{peer}"
        self.url = client
        self.process = place.spawn(
            "etcd",
            ["etcd", "--name", "compat", "--data-dir", place.folder("etcd"), "--unsafe-no-fsync", "--listen-client-urls", client, "--advertise-client-urls", client,
             "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"compat={peers}"],
        )
        wait("etcd answers", self._ready, 180, self.process)

    def _ready(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return json.load(reply)["health"] == "true"
        except (OSError, ValueError):
            return False

    def _call(self, path, body):
        request = urllib.request.Request(f"{self.url}/v3/kv/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def put(self, key, value):
        self._call("put", {"key": _b64(f"/sorna/{self.namespace}/{key}"), "value": _b64(value)})

    def put_tree(self, prefix, tree):
        for name, value in tree.items():
            key = f"{prefix}/{name}" if name else prefix
            self.put_tree(key, value) if isinstance(value, dict) else self.put(key, value)

    def keys(self, prefix=""):
        """What lies below a prefix, without the namespace."""
        first = f"/sorna/{self.namespace}/{prefix}".encode()
        last = first[:-1] + bytes([first[-1] + 1])
        found = self._call("range", {"key": _b64(first), "range_end": _b64(last)}).get("kvs", [])
        head = len(f"/sorna/{self.namespace}/")
        return {_text(item["key"])[head:]: _text(item.get("value", "")) for item in found}

    def revision(self):
        return int(self._call("range", {"key": _b64("/")})["header"]["revision"])

    def history(self, prefix):
        """(revision, "put" or "delete", key, value) of every change below a prefix since the server was made."""
        first = f"/sorna/{self.namespace}/{prefix}".encode()
        last = first[:-1] + bytes([first[-1] + 1])
        order = {"create_request": {"key": _b64(first), "range_end": _b64(last), "start_revision": "1", "progress_notify": False}}
        request = urllib.request.Request(f"{self.url}/v3/watch", json.dumps(order).encode(), {"Content-Type": "application/json"})
        head, changes = len(f"/sorna/{self.namespace}/"), []
        with urllib.request.urlopen(request, timeout=3) as reply:
            try:
                for line in reply:
                    for event in json.loads(line)["result"].get("events", []):
                        item = event["kv"]
                        kind = event.get("type", "PUT").lower()
                        changes.append((int(item["mod_revision"]), kind, _text(item["key"])[head:], _text(item.get("value", ""))))
            except TimeoutError:
                # The past has been told; the server waits for the future.
                pass
        return changes


def _b64(text):
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def _text(encoded):
    return base64.b64decode(encoded).decode()
