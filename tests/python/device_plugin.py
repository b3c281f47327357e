"""A device plugin of Kubernetes (API v1beta1) on the published gRPC library, as vendors write theirs.

Usage: device_plugin.py DESCRIPTORS DIRECTORY ENDPOINT RESOURCE

DESCRIPTORS is the published definition of the API (tests/scripts/device-plugin-api): messages, methods and their types are its own.

Registers at DIRECTORY/kubelet.sock, and again whenever that socket is made anew. A line of JSON on stdin replaces what it
does; a line of JSON on stdout tells each call it gets. Keys of its behaviour:
  devices   {id: "Healthy" | "Unhealthy", ...}
  options   {"pre_start_required": bool, "get_preferred_allocation_available": bool}
  prefer    ids that GetPreferredAllocation answers
  allocate  the ContainerAllocateResponse, as a map
  cdi       kind of CDI whose names, by the ids that were asked for, are in the response too
  hang      names of calls that are never answered
  slow      {name of a call: seconds until it is answered}
  late      seconds between the first registration and the opening of its socket
  numa      the NUMA node it tells (0 if not said)
  fail      names of calls that fail
  close     whether the list of devices ends at once
  flood     whether it is sent again without end
  version   what it registers with
"""

import json
import os
import sys
import threading
import time
from concurrent import futures

import grpc
from google.protobuf import json_format

from protobuf_messages import Published

SERVICE, REGISTER = "v1beta1.DevicePlugin", "v1beta1.Registration"


def tell(**what):
    print(json.dumps(what), flush=True)


class Plugin:
    def __init__(self, descriptors, directory, endpoint, resource):
        self.api = Published(descriptors)
        self.directory, self.endpoint, self.resource = directory, endpoint, resource
        self.changed = threading.Condition()
        self.behaviour, self.version = {}, 0
        self.registered = None

    def does(self, key, otherwise):
        with self.changed:
            return self.behaviour.get(key, otherwise)

    def called(self, name, context, **what):
        tell(called=name, **what)
        time.sleep(self.does("slow", {}).get(name, 0))
        while name in self.does("hang", []) and context.is_active():
            time.sleep(0.05)
        if name in self.does("fail", []):
            context.abort(grpc.StatusCode.INTERNAL, "told to fail")

    def options(self, _request, context):
        self.called("GetDevicePluginOptions", context)
        return self.api.messages["DevicePluginOptions"](**self.does("options", {}))

    def watch(self, _request, context):
        self.called("ListAndWatch", context)
        seen = -1
        while context.is_active():
            with self.changed:
                if self.behaviour.get("close"):
                    return
                if not self.behaviour.get("flood") and not self.changed.wait_for(lambda: self.version != seen, 0.2):
                    continue
                seen, devices = self.version, list(self.behaviour.get("devices", {}).items())
            topology = self.api.messages["TopologyInfo"](nodes=[self.api.messages["NUMANode"](ID=self.does("numa", 0))])
            yield self.api.messages["ListAndWatchResponse"](devices=[self.api.messages["Device"](ID=name, health=health, topology=topology) for name, health in devices])

    def prefer(self, request, context):
        asked = request.container_requests[0]
        self.called("GetPreferredAllocation", context, available=sorted(asked.available_deviceIDs), size=asked.allocation_size)
        ids = self.does("prefer", list(asked.available_deviceIDs)[: asked.allocation_size])
        return self.api.messages["PreferredAllocationResponse"](container_responses=[self.api.messages["ContainerPreferredAllocationResponse"](deviceIDs=ids)])

    def allocate(self, request, context):
        self.called("Allocate", context, ids=[list(one.devices_ids) for one in request.container_requests])
        kind = self.does("cdi", None)
        answers = []
        for one in request.container_requests:
            answer = json_format.ParseDict(self.does("allocate", {}), self.api.messages["ContainerAllocateResponse"]())
            if kind:
                answer.cdi_devices.extend(self.api.messages["CDIDevice"](name=f"{kind}={name}") for name in one.devices_ids)
            answers.append(answer)
        return self.api.messages["AllocateResponse"](container_responses=answers)

    def pre_start(self, request, context):
        self.called("PreStartContainer", context, ids=list(request.devices_ids))
        return self.api.messages["PreStartContainerResponse"]()

    def serve(self):
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        behind = {
            "GetDevicePluginOptions": self.options,
            "ListAndWatch": self.watch,
            "GetPreferredAllocation": self.prefer,
            "Allocate": self.allocate,
            "PreStartContainer": self.pre_start,
        }
        handlers = {}
        for name, method in self.api.methods(SERVICE).items():
            kind = stream if method.server_streaming else unary
            handlers[name] = kind(behind[name], request_deserializer=method.request.FromString, response_serializer=method.response.SerializeToString)
        server = grpc.server(futures.ThreadPoolExecutor(16))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        socket = os.path.join(self.directory, self.endpoint)
        if os.path.exists(socket):
            os.unlink(socket)
        server.add_insecure_port(f"unix://{socket}")
        server.start()
        return server

    def register(self):
        with grpc.insecure_channel(f"unix://{self.directory}/kubelet.sock") as channel:
            method = self.api.methods(REGISTER)["Register"]
            call = channel.unary_unary(method.path, request_serializer=method.request.SerializeToString, response_deserializer=method.response.FromString)
            options = self.api.messages["DevicePluginOptions"](**self.does("options", {}))
            request = method.request(version=self.does("version", "v1beta1"), endpoint=self.endpoint, resource_name=self.resource, options=options)
            call(request, timeout=10)

    def keep_registered(self):
        """Published plugins watch the socket and register when it is made anew."""
        while True:
            try:
                found = os.stat(f"{self.directory}/kubelet.sock")
                if (found.st_ino, found.st_ctime_ns) != self.registered:
                    self.register()
                    self.registered = (found.st_ino, found.st_ctime_ns)
                    tell(registered=True)
            except FileNotFoundError:
                pass
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
                    tell(refused=error.details())
                    self.registered = (found.st_ino, found.st_ctime_ns)
            time.sleep(0.1)


def main():
    plugin = Plugin(*sys.argv[1:])
    line = sys.stdin.readline()
    plugin.behaviour = json.loads(line)
    registering = threading.Thread(target=plugin.keep_registered, daemon=True)
    late = plugin.does("late", 0)
    if late:
        registering.start()
        while not plugin.registered:
            time.sleep(0.05)
        time.sleep(late)
    server = plugin.serve()
    if not late:
        registering.start()
    for line in sys.stdin:
        with plugin.changed:
            plugin.behaviour = json.loads(line)
            plugin.version += 1
            plugin.changed.notify_all()
    server.stop(0)


if __name__ == "__main__":
    main()
