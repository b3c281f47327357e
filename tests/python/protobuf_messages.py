"""Classes of protobuf messages, for the other end of published gRPC services: out of published descriptors, else out of tables."""

from collections import namedtuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

KINDS = descriptor_pb2.FieldDescriptorProto


def classes(package, messages):
    """{name of a message: its class}, of {name: [(field, number, type), ...]}.

    A type is a type of protobuf in lower case, another message, or "map" (of strings to strings); a star behind it repeats it.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            repeated = kind == "map" or kind.endswith("*")
            kind = kind.rstrip("*")
            entry = message.field.add(name=field, number=number, label=KINDS.LABEL_REPEATED if repeated else KINDS.LABEL_OPTIONAL)
            if kind == "map":
                nested = message.nested_type.add(name="".join(part.capitalize() for part in field.split("_")) + "Entry")
                nested.options.map_entry = True
                for place, part in enumerate(("key", "value"), 1):
                    nested.field.add(name=part, number=place, type=KINDS.TYPE_STRING, label=KINDS.LABEL_OPTIONAL)
                entry.type, entry.type_name = KINDS.TYPE_MESSAGE, f".{package}.{name}.{nested.name}"
            elif kind in messages:
                entry.type, entry.type_name = KINDS.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                entry.type = getattr(KINDS, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages}


Method = namedtuple("Method", "path request response server_streaming")


class Published:
    """The messages and services of a file of descriptors, as `protoc --descriptor_set_out` writes it."""

    def __init__(self, path):
        with open(path, "rb") as file:
            [self.file] = descriptor_pb2.FileDescriptorSet.FromString(file.read()).file
        self.pool = descriptor_pool.DescriptorPool()
        self.pool.Add(self.file)
        self.messages = {message.name: self._message(message.name) for message in self.file.message_type}

    def _message(self, name):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"{self.file.package}.{name}"))

    def methods(self, service):
        """{name of a method: what it takes and gives, and its path}."""
        found = self.pool.FindServiceByName(service).methods
        return {
            method.name: Method(f"/{service}/{method.name}", self.messages[method.input_type.name], self.messages[method.output_type.name], method.server_streaming)
            for method in found
        }
