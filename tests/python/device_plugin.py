"""A device plugin of Kubernetes (API v1beta1) on the published gRPC library, as vendors write theirs.

Usage: device_plugin.py DIRECTORY ENDPOINT RESOURCE

Registers at DIRECTORY/kubelet.sock, and again whenever that socket is made anew. A line of JSON on stdin replaces what it
does; a line of JSON on stdout tells each call it gets. Keys of its behaviour:
  devices   {id: "Healthy" | "Unhealthy", ...}
  options   {"pre_start_required": bool, "get_preferred_allocation_available": bool}
  prefer    ids that GetPreferredAllocation answers
  allocate  the ContainerAllocateResponse, as a map
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
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

# Message: field, number, type (a lower-case type of protobuf, or a message), repeated. Names and numbers are the API's.
MESSAGES = {
    "Empty": [],
    "DevicePluginOptions": [("pre_start_required", 1, "bool", False), ("get_preferred_allocation_available", 2, "bool", False)],
    "RegisterRequest": [("version", 1, "string", False), ("endpoint", 2, "string", False), ("resource_name", 3, "string", False), ("options", 4, "DevicePluginOptions", False)],
    "NUMANode": [("ID", 1, "int64", False)],
    "TopologyInfo": [("nodes", 1, "NUMANode", True)],
    "Device": [("ID", 1, "string", False), ("health", 2, "string", False), ("topology", 3, "TopologyInfo", False)],
    "ListAndWatchResponse": [("devices", 1, "Device", True)],
    "ContainerPreferredAllocationRequest": [("available_deviceIDs", 1, "string", True), ("must_include_deviceIDs", 2, "string", True), ("allocation_size", 3, "int32", False)],
    "PreferredAllocationRequest": [("container_requests", 1, "ContainerPreferredAllocationRequest", True)],
    "ContainerPreferredAllocationResponse": [("deviceIDs", 1, "string", True)],
    "PreferredAllocationResponse": [("container_responses", 1, "ContainerPreferredAllocationResponse", True)],
    "PreStartContainerRequest": [("devices_ids", 1, "string", True)],
    "PreStartContainerResponse": [],
    "ContainerAllocateRequest": [("devices_ids", 1, "string", True)],
    "AllocateRequest": [("container_requests", 1, "ContainerAllocateRequest", True)],
    "Mount": [("container_path", 1, "string", False), ("host_path", 2, "string", False), ("read_only", 3, "bool", False)],
    "DeviceSpec": [("container_path", 1, "string", False), ("host_path", 2, "string", False), ("permissions", 3, "string", False)],
    "CDIDevice": [("name", 1, "string", False)],
    "ContainerAllocateResponse": [("envs", 1, "map", True), ("mounts", 2, "Mount", True), ("devices", 3, "DeviceSpec", True), ("annotations", 4, "map", True), ("cdi_devices", 5, "CDIDevice", True)],
    "AllocateResponse": [("container_responses", 1, "ContainerAllocateResponse", True)],
}


def classes():
    file = descriptor_pb2.FileDescriptorProto(name="api.proto", package="v1beta1", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            entry = message.field.add(name=field, number=number, label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL)
            if kind == "map":
                nested = message.nested_type.add(name="".join(part.capitalize() for part in field.split("_")) + "Entry")
                nested.options.map_entry = True
                for place, part in enumerate(("key", "value"), 1):
                    nested.field.add(name=part, number=place, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, f".v1beta1.{name}.{nested.name}"
            elif kind in MESSAGES:
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, f".v1beta1.{kind}"
            else:
                entry.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"v1beta1.{name}")) for name in MESSAGES}


API = classes()


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
        answer = json_format.ParseDict(self.does("allocate", {}), API["ContainerAllocateResponse"]())
        return API["AllocateResponse"](container_responses=[answer for _ in request.container_requests])

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
