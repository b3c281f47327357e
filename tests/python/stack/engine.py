"""A Docker engine of the run's own, with the kernel images in it.

An agent of the original handles the events of every container with its labels, so no other containers may be near. The
images stay in the cache; one run at a time uses it.
"""

import fcntl
import hashlib
import os
import pathlib
import tarfile

from .place import Failed, command, wait

ROOT = pathlib.Path(__file__).resolve().parents[3]
MAKE_IMAGE = ROOT / "tests/scripts/make-image"
# The manager's name of an image is registry/project/name:tag; the engine's of a local one lacks the registry.
# `python` runs queries; `app` is small, for all that needs no Python inside.
IMAGES = {"local/stable/python:3.11-compat": "python", "local/stable/app:1-compat": "runner"}
PYTHON, APP = IMAGES
# Nothing is in it, so no kernel can start.
BROKEN = "local/stable/broken:1-compat"
BROKEN_LABELS = ["kernelspec=1", "base-distro=ubuntu22.04", "runtime-type=app", "features=batch", "resource.min.cpu=1", "resource.min.mem=64m"]


def cache():
    base = os.environ.get("BAI_AGENT_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "bai-agent")
    path = pathlib.Path(base) / "compat"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _lock():
    file = open(cache() / "engine.lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another run uses the cached engine; waiting for its end", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def kept(name):
    """A name of the image that nobody else touches."""
    return name.replace("local/stable/", "bai-compat/")


class Engine:
    """`network=False`: an engine that only builds images (no bridge)."""

    def __init__(self, place, network=True):
        self.place = place
        self.lock = _lock()
        run = place.folder("engine")
        self.socket = run / "docker.sock"
        self.host = f"unix://{self.socket}"
        self.env = {"DOCKER_HOST": self.host}
        flags = [] if network else ["--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"]
        # Without a bridge an engine takes the default one away, and with it the host's own engine's.
        apart = [] if network else ["unshare", "--net"]
        # Two tries: an engine may meet the containerd that a killed one has left.
        for attempt in (1, 2):
            self.process = place.spawn(
                "dockerd",
                [*apart, "dockerd", "--data-root", cache() / "engine", "--exec-root", run / "exec", "--pidfile", run / "docker.pid", "--host", self.host, *flags],
            )
            try:
                wait("the engine answers", self.answers, 180, self.process)
                break
            except Failed:
                place.stop(self.process)
                if attempt == 2:
                    raise

        # A run that was killed has left its own, or names missing.
        self.clear()
        if network:
            self.name_images()

    def name_images(self):
        for name in (*IMAGES, BROKEN):
            for other in (name, name.removeprefix("local/")):
                self.docker("tag", kept(name), other)

    def clear(self):
        """Removes all containers."""
        ids = self.containers()
        if ids:
            self.docker("rm", "--force", "--volumes", *ids)

    def answers(self):
        return self.socket.exists() and "Server Version" in self.docker("info", check=False, limit=20)

    def docker(self, *argv, check=True, limit=120):
        return command(["docker", *argv], env=self.env, check=check, limit=limit)

    def containers(self, *filters):
        """Ids of all containers, ended ones too."""
        options = [word for item in filters for word in ("--filter", item)]
        return self.docker("ps", "--all", "--quiet", "--no-trunc", *options).split()

    def close(self):
        self.clear()
        self.docker("network", "prune", "--force", check=False)
        self.place.stop(self.process, limit=30)
        self.lock.close()


def have_images(new_place):
    """Makes the kernel images where the engines of later runs find it."""
    recipe = hashlib.sha256(MAKE_IMAGE.read_bytes() + repr((IMAGES, BROKEN, BROKEN_LABELS, kept(BROKEN))).encode()).hexdigest()[:16]
    stamp = cache() / "image.stamp"
    if stamp.exists() and stamp.read_text() == recipe and (cache() / "engine").exists():
        return
    print("making the kernel images (once)", flush=True)
    place = new_place()
    try:
        engine = Engine(place, network=False)
        for name, kind in IMAGES.items():
            command([MAKE_IMAGE, kind, "--tag", name], env=engine.env, limit=1800)
        changes = [word for label in BROKEN_LABELS for word in ("--change", f"LABEL ai.backend.{label}")]
        empty = place.directory / "empty.tar"
        tarfile.open(empty, "w").close()
        engine.docker("import", *changes, empty, BROKEN)
        for name in (*IMAGES, BROKEN):
            engine.docker("tag", name, kept(name))
        stamp.write_text(recipe)
        engine.close()
    finally:
        place.close()
