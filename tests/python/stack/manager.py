"""The published manager and storage proxy, set up as an operator would: configuration files, a schema, fixtures.

What is set up by the manager's own command line (tables, fixtures, image records) is kept in the cache as a database
directory and copied by later runs; what names ports is written anew each time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import urllib.request

import zmq.auth

from . import engine as engines
from .engine import ROOT, cache
from .place import Failed, answers, command, wait
from .stores import DATABASE, PASSWORD, Etcd, Postgres, Redis

DOMAIN = GROUP = "default"
GROUP_ID = "71e08f7b-54c1-4a6b-9a3f-2d5a0d3f0a01"
ADMIN_ID = "71e08f7b-54c1-4a6b-9a3f-2d5a0d3f0b01"
ADMIN_KEY, ADMIN_SECRET = "AKIACOMPATADMIN00001", "compat-admin-secret-key-0000000000000000"
VOLUME = "local:volume1"
STORAGE_SECRET = "compat-storage-shared"
PERMISSIONS = ["create-vfolder", "modify-vfolder", "delete-vfolder", "mount-in-session", "upload-file", "download-file", "invite-others", "set-user-specific-permission"]


def fixtures():
    """The rows of a system with one domain, one group, one resource group, one user."""
    hosts = {VOLUME: PERMISSIONS}
    return [
        {
            "domains": [{"name": DOMAIN, "description": "", "is_active": True, "total_resource_slots": {}, "allowed_vfolder_hosts": hosts, "allowed_docker_registries": ["local"]}],
            "user_resource_policies": [{"name": "default", "max_vfolder_count": 0, "max_quota_scope_size": -1, "max_session_count_per_model_session": 10}],
            "project_resource_policies": [{"name": "default", "max_vfolder_count": 0, "max_quota_scope_size": -1, "max_network_count": 3}],
            "groups": [{"id": GROUP_ID, "name": GROUP, "description": "", "is_active": True, "domain_name": DOMAIN, "resource_policy": "default", "total_resource_slots": {}, "allowed_vfolder_hosts": hosts, "type": "general"}],
            "scaling_groups": [{"name": "default", "description": "", "is_active": True, "driver": "static", "driver_opts": {}, "scheduler": "fifo", "scheduler_opts": {"allowed_session_types": ["interactive", "batch", "inference"]}, "wsproxy_addr": "http://127.0.0.1:1", "wsproxy_api_token": "none"}],
            "sgroups_for_domains": [{"scaling_group": "default", "domain": DOMAIN}],
            "users": [{"uuid": ADMIN_ID, "username": "admin", "email": "admin@compat.test", "password": "admin-pw-0000", "need_password_change": False, "full_name": "admin", "description": "", "status": "active", "status_info": "admin-requested", "domain_name": DOMAIN, "resource_policy": "default", "role": "superadmin", "main_access_key": None}],
            "association_groups_users": [{"group_id": GROUP_ID, "user_id": ADMIN_ID}],
        },
        {
            "keypair_resource_policies": [{"name": "default", "default_for_unspecified": "UNLIMITED", "total_resource_slots": {}, "max_session_lifetime": 0, "max_concurrent_sessions": 500, "max_containers_per_session": 4, "idle_timeout": 36000, "allowed_vfolder_hosts": hosts}],
            "keypairs": [{"user_id": "admin@compat.test", "access_key": ADMIN_KEY, "secret_key": ADMIN_SECRET, "is_active": True, "resource_policy": "default", "rate_limit": 300000, "num_queries": 0, "is_admin": True, "user": ADMIN_ID}],
        },
        {"__mode": "update", "users": [{"uuid": ADMIN_ID, "main_access_key": ADMIN_KEY}]},
        {"container_registries": [{"id": "71e08f7b-54c1-4a6b-9a3f-2d5a0d3f0c01", "registry_name": "local", "url": "http://localhost", "type": "local", "project": "stable"}]},
    ]


LOGGING = """
[logging]
level = "INFO"
drivers = ["console"]
[logging.pkg-ns]
"" = "WARNING"
"ai.backend" = "INFO"
[logging.console]
colored = false
format = "verbose"
"""


class System:
    """Stores, storage proxy, manager and engine, up and answering. The agent is apart (`agents.py`).

    `manager=False`: only what an agent needs to start, for benches that call it directly. (A manager would have the kernels
    destroyed that it doesn't know.)
    """

    def __init__(self, place, manager=True):
        self.place = place
        self.engine = engines.Engine(place)
        place.undo.append(self.engine.close)
        self.etcd = Etcd(place)
        self.redis = Redis(place)
        self.etc = place.folder("etc")
        self.volume = place.folder("volumes/volume1")
        (self.volume / "version.txt").write_text("3\n")
        self.manager_port = place.port()
        self.proxy_port = place.port()
        self.storage_ports = {"client": place.port(), "manager": place.port()}
        # The manager wants a key pair even when no agent authenticates.
        zmq.auth.create_certificates(self.etc, "manager")
        self._seed_etcd()
        if not manager:
            # What a manager that runs says of itself; agents wait for it.
            self.etcd.put("nodes/manager/i-none", "up")
            return
        template = cache() / f"database-{self._recipe()}"
        self.postgres = Postgres(place, template if template.exists() else None)
        self._write_files()
        if not template.exists():
            self._seed_database(template)
        self.postgres.sql(f"update scaling_groups set wsproxy_addr='http://127.0.0.1:{self.proxy_port}'")
        self._start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.manager_port}"

    def _recipe(self):
        images = [self.engine.docker("image", "inspect", "--format", "{{.Id}}", name).strip() for name in (*engines.IMAGES, engines.BROKEN)]
        parts = [json.dumps(fixtures()), (ROOT / "tests/python/manager-requirements.txt").read_text(), Postgres.find()[1], *images]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def _seed_etcd(self):
        self.etcd.put("config/redis/addr", self.redis.address)
        self.etcd.put("config/watcher/token", "compat-watcher-token")
        self.etcd.put_tree("volumes", {
            "default_host": VOLUME,
            "exposed_volume_info": "percentage",
            "_types": {"group": "", "user": ""},
            "proxies": {"local": {
                "client_api": f"http://127.0.0.1:{self.storage_ports['client']}",
                "manager_api": f"http://127.0.0.1:{self.storage_ports['manager']}",
                "secret": STORAGE_SECRET,
                "ssl_verify": "false",
            }},
        })

    def _write_files(self):
        etcd = f'[etcd]\nnamespace = "{self.etcd.namespace}"\naddr = {{ host = "127.0.0.1", port = {self.etcd.port} }}\n'
        monitors = lambda: f"aiomonitor-termui-port = {self.place.port()}\naiomonitor-webui-port = {self.place.port()}\n"
        manager = self.etc / "manager.toml"
        manager.write_text(f"""{etcd}
[db]
type = "postgresql"
addr = {{ host = "127.0.0.1", port = {self.postgres.port} }}
name = "{DATABASE}"
user = "postgres"
password = "{PASSWORD}"
[manager]
num-proc = 1
service-addr = {{ host = "127.0.0.1", port = {self.manager_port} }}
internal-addr = {{ host = "127.0.0.1", port = {self.place.port()} }}
ssl-enabled = false
heartbeat-timeout = 40.0
ipc-base-path = "{self.place.folder('ipc/manager')}"
pid-file = "{self.place.directory}/manager.pid"
rpc-auth-manager-keypair = "{self.etc}/manager.key_secret"
{monitors()}
[docker-registry]
ssl-verify = false
[debug]
enabled = false
{LOGGING}""")
        manager.chmod(0o600)
        (self.etc / "alembic.ini").write_text(f"""[alembic]
script_location = ai.backend.manager.models:alembic
sqlalchemy.url = postgresql://postgres:{PASSWORD}@127.0.0.1:{self.postgres.port}/{DATABASE}
[loggers]
keys = root
[logger_root]
level = WARN
handlers = console
[handlers]
keys = console
[handler_console]
class = StreamHandler
args = (sys.stderr,)
level = NOTSET
formatter = generic
[formatters]
keys = generic
[formatter_generic]
format = %(levelname)-5.5s [%(name)s] %(message)s
""")
        (self.etc / "storage-proxy.toml").write_text(f"""{etcd}
[storage-proxy]
node-id = "i-compat-storage"
num-proc = 1
event-loop = "asyncio"
scandir-limit = 1000
max-upload-size = "1g"
secret = "compat-storage-private"
session-expire = "1d"
use-watcher = false
ipc-base-path = "{self.place.folder('ipc/storage')}"
pid-file = "{self.place.directory}/storage.pid"
{monitors()}
[api.client]
service-addr = {{ host = "127.0.0.1", port = {self.storage_ports['client']} }}
ssl-enabled = false
[api.manager]
service-addr = {{ host = "127.0.0.1", port = {self.storage_ports['manager']} }}
internal-addr = {{ host = "127.0.0.1", port = {self.place.port()} }}
ssl-enabled = false
secret = "{STORAGE_SECRET}"
[volume]
[volume.volume1]
backend = "vfs"
path = "{self.volume}"
[debug]
enabled = false
{LOGGING}""")

    def _cli(self, *argv):
        # The etcd client of the package sometimes aborts at the interpreter's exit (134); these commands can be repeated.
        for _ in range(3):
            try:
                return command([sys.executable, "-m", "ai.backend.cli", "mgr", "-f", self.etc / "manager.toml", *argv], env=self.engine.env, cwd=self.etc, limit=600)
            except Failed as error:
                last = error
                if "exit -6" not in str(error) and "exit 134" not in str(error):
                    break
        raise last

    def _seed_database(self, template):
        print("seeding the database (once)", flush=True)
        self._cli("schema", "oneshot")
        for number, rows in enumerate(fixtures()):
            file = self.etc / f"fixture-{number}.json"
            file.write_text(json.dumps(rows))
            self._cli("fixture", "populate", file)
        self._cli("image", "rescan", "local")
        self.postgres.stop()
        for old in cache().glob("database-*"):
            shutil.rmtree(old)
        part = template.with_name(f"part-{os.getpid()}")
        command(["cp", "-a", self.postgres.data, part])
        part.rename(template)
        self.postgres.start()

    def _start(self):
        python = [sys.executable, "-m", "ai.backend.cli"]
        self.storage = self.place.spawn("storage-proxy", [*python, "storage", "start-server", "-f", self.etc / "storage-proxy.toml"], env=self.engine.env)
        self.manager = self.place.spawn("manager", [*python, "mgr", "start-server", "-f", self.etc / "manager.toml"], env=self.engine.env)
        wait("the manager answers", self._manager_answers, 400, self.manager)
        wait("the storage proxy answers", lambda: answers(self.storage_ports["manager"]), 400, self.storage)

    @contextlib.contextmanager
    def registry(self, image):
        """An image registry that the manager knows, with `image` in it and no longer in the engine under its name there."""
        address = f"127.0.0.1:{self.place.port()}"
        storage = self.place.folder("registry")
        config = storage / "config.yml"
        config.write_text(f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {storage}/blobs\nhttp:\n  addr: {address}\n")
        process = self.place.spawn("docker-registry", ["docker-registry", "serve", config])
        try:
            wait("the registry answers", lambda: answers(int(address.split(":")[1])), 60, process)
            path, tag = image.removeprefix("local/").split(":")
            name = f"{address}/{path}:{tag}"
            self.engine.docker("tag", image, name)
            self.engine.docker("push", name)
            self.engine.docker("rmi", "--no-prune", name)
            # As `mgr image rescan` does, which takes half a minute.
            self.postgres.sql(f"""
                insert into container_registries (id, registry_name, url, type, project) values (gen_random_uuid(), '{address}', 'http://{address}', 'docker', 'stable');
                insert into images (name, project, image, tag, registry, registry_id, architecture, config_digest, size_bytes, is_local, type, accelerators, labels, resources, status)
                    select '{name}', 'stable', image, tag, '{address}', (select id from container_registries where registry_name = '{address}'),
                        architecture, config_digest, size_bytes, false, type, accelerators, labels, resources, status from images where name = '{image}';
                update domains set allowed_docker_registries = array_append(allowed_docker_registries, '{address}')""")
            yield name
        finally:
            self.place.stop(process)

    def _manager_answers(self):
        try:
            with urllib.request.urlopen(f"{self.endpoint}/", timeout=5) as reply:
                return json.load(reply)
        except (OSError, ValueError):
            return None
