"""A device plugin of Kubernetes (API v1beta1) on the published gRPC library, as vendors write theirs.

Usage: device_plugin.py DIRECTORY ENDPOINT RESOURCE

Registers at DIRECTORY/kubelet.sock, and again whenever that socket is made anew. A line of JSON on stdin replaces what it
does; a line of JSON on stdout tells each call it gets. Keys of its behaviour:
  devices   {id: "Healthy" | "Unhealthy", ...}
  options   {"pre_start_required": bool, "get_preferred_allocation_available": bool}
  prefer    ids that GetPreferredAllocation answers
  allocate  the ContainerAllocateResponse, as a map
  cdi       kind of CDI whose names, by the ids that were asked for, are in the response too
  hang      names of calls that are never answered
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

from protobuf_messages import classes

# Names and numbers are the API's.
MESSAGES = {
    "Empty": [],
    "DevicePluginOptions": [("pre_start_required", 1, "bool"), ("get_preferred_allocation_available", 2, "bool")],
    "RegisterRequest": [("version", 1, "string"), ("endpoint", 2, "string"), ("resource_name", 3, "string"), ("options", 4, "DevicePluginOptions")],
    "NUMANode": [("ID", 1, "int64")],
    "TopologyInfo": [("nodes", 1, "NUMANode*")],
    "Device": [("ID", 1, "string"), ("health", 2, "string"), ("topology", 3, "TopologyInfo")],
    "ListAndWatchResponse": [("devices", 1, "Device*")],
    "ContainerPreferredAllocationRequest": [("available_deviceIDs", 1, "string*"), ("must_include_deviceIDs", 2, "string*"), ("allocation_size", 3, "int32")],
    "PreferredAllocationRequest": [("container_requests", 1, "ContainerPreferredAllocationRequest*")],
    "ContainerPreferredAllocationResponse": [("deviceIDs", 1, "string*")],
    "PreferredAllocationResponse": [("container_responses", 1, "ContainerPreferredAllocationResponse*")],
    "PreStartContainerRequest": [("devices_ids", 1, "string*")],
    "PreStartContainerResponse": [],
    "ContainerAllocateRequest": [("devices_ids", 1, "string*")],
    "AllocateRequest": [("container_requests", 1, "ContainerAllocateRequest*")],
    "Mount": [("container_path", 1, "string"), ("host_path", 2, "string"), ("read_only", 3, "bool")],
    "DeviceSpec": [("container_path", 1, "string"), ("host_path", 2, "string"), ("permissions", 3, "string")],
    "CDIDevice": [("name", 1, "string")],
    "ContainerAllocateResponse": [("envs", 1, "map"), ("mounts", 2, "Mount*"), ("devices", 3, "DeviceSpec*"), ("annotations", 4, "map"), ("cdi_devices", 5, "CDIDevice*")],
    "AllocateResponse": [("container_responses", 1, "ContainerAllocateResponse*")],
}

API = classes("v1beta1", MESSAGES)


def tell(**what):
    print(json.dumps(what), flush=True)


class Plugin:
    def __init__(self, directory, endpoint, resource):
        self.directory, self.endpoint, self.resource = directory, endpoint, resource
        self.changed = threading.Condition()
        self.behaviour, self.version = {}, 0
        self.registered = None

    def does(self, key, otherwise):
        with self.changed:
            return self.behaviour.get(key, otherwise)

    def called(self, name, context, **what):
        tell(called=name, **what)
        while name in self.does("hang", []) and context.is_active():
            time.sleep(0.05)
        if name in self.does("fail", []):
            context.abort(grpc.StatusCode.INTERNAL, "told to fail")

    def options(self, _request, context):
        self.called("GetDevicePluginOptions", context)
        return API["DevicePluginOptions"](**self.does("options", {}))

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
            topology = API["TopologyInfo"](nodes=[API["NUMANode"](ID=0)])
            yield API["ListAndWatchResponse"](devices=[API["Device"](ID=name, health=health, topology=topology) for name, health in devices])

    def prefer(self, request, context):
        asked = request.container_requests[0]
        self.called("GetPreferredAllocation", context, available=sorted(asked.available_deviceIDs), size=asked.allocation_size)
        ids = self.does("prefer", list(asked.available_deviceIDs)[: asked.allocation_size])
        return API["PreferredAllocationResponse"](container_responses=[API["ContainerPreferredAllocationResponse"](deviceIDs=ids)])

    def allocate(self, request, context):
        self.called("Allocate", context, ids=[list(one.devices_ids) for one in request.container_requests])
        kind = self.does("cdi", None)
        answers = []
        for one in request.container_requests:
            answer = json_format.ParseDict(self.does("allocate", {}), API["ContainerAllocateResponse"]())
            if kind:
                answer.cdi_devices.extend(API["CDIDevice"](name=f"{kind}={name}") for name in one.devices_ids)
            answers.append(answer)
        return API["AllocateResponse"](container_responses=answers)

    def pre_start(self, request, context):
        self.called("PreStartContainer", context, ids=list(request.devices_ids))
        return API["PreStartContainerResponse"]()

    def serve(self):
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "GetDevicePluginOptions": (unary, self.options, "Empty"),
            "ListAndWatch": (stream, self.watch, "Empty"),
            "GetPreferredAllocation": (unary, self.prefer, "PreferredAllocationRequest"),
            "Allocate": (unary, self.allocate, "AllocateRequest"),
            "PreStartContainer": (unary, self.pre_start, "PreStartContainerRequest"),
        }
        handlers = {name: kind(method, request_deserializer=API[request].FromString, response_serializer=lambda answer: answer.SerializeToString()) for name, (kind, method, request) in methods.items()}
        server = grpc.server(futures.ThreadPoolExecutor(16))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1beta1.DevicePlugin", handlers),))
        socket = os.path.join(self.directory, self.endpoint)
        if os.path.exists(socket):
            os.unlink(socket)
        server.add_insecure_port(f"unix://{socket}")
        server.start()
        return server

    def register(self):
        with grpc.insecure_channel(f"unix://{self.directory}/kubelet.sock") as channel:
            call = channel.unary_unary("/v1beta1.Registration/Register", request_serializer=API["RegisterRequest"].SerializeToString, response_deserializer=API["Empty"].FromString)
            options = API["DevicePluginOptions"](**self.does("options", {}))
            call(API["RegisterRequest"](version=self.does("version", "v1beta1"), endpoint=self.endpoint, resource_name=self.resource, options=options), timeout=10)

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
    server = plugin.serve()
    threading.Thread(target=plugin.keep_registered, daemon=True).start()
    for line in sys.stdin:
        with plugin.changed:
            plugin.behaviour = json.loads(line)
            plugin.version += 1
            plugin.changed.notify_all()
    server.stop(0)


if __name__ == "__main__":
    main()
