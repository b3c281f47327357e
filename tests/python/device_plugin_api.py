"""Tells what the published device-plugin API says, for a comparison of encodings byte by byte.

Usage: device_plugin_api.py DESCRIPTORS

Prints one JSON object: "methods", [path, request, response, whether it streams] each, and "messages", {name: [hex, hex]}: a message twice with
all its fields set, to values that tell which field they belong to. A text is the field's name, a number the least of its type and the
field's number; lists have two entries (a text of the second ends in a 2); of booleans those with odd numbers are true, the second time the others.
"""

import json
import sys

from google.protobuf.descriptor import FieldDescriptor

from protobuf_messages import Published

LEAST = {FieldDescriptor.TYPE_INT32: -(2**31), FieldDescriptor.TYPE_INT64: -(2**63)}


def fill(message, odd):
    for field in message.DESCRIPTOR.fields:
        target = getattr(message, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            target[field.name + ".key"] = field.name
        elif field.label == FieldDescriptor.LABEL_REPEATED and field.message_type:
            for _ in range(2):
                fill(target.add(), odd)
        elif field.label == FieldDescriptor.LABEL_REPEATED and field.type == FieldDescriptor.TYPE_STRING:
            target.extend([field.name, field.name + "2"])
        elif field.message_type:
            target.SetInParent()
            fill(target, odd)
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(message, field.name, field.name)
        elif field.type == FieldDescriptor.TYPE_BOOL:
            setattr(message, field.name, (field.number % 2 == 1) == odd)
        elif field.type in LEAST:
            setattr(message, field.name, LEAST[field.type] + field.number)
        else:
            raise SystemExit(f"{field.full_name} is of a type that this program does not know: {field.type}")
    return message


def main():
    published = Published(sys.argv[1])
    methods = [
        [method.path, method.request.DESCRIPTOR.name, method.response.DESCRIPTOR.name, method.server_streaming]
        for service in published.file.service
        for method in published.methods(f"{published.file.package}.{service.name}").values()
    ]
    filled = {name: [fill(kind(), odd).SerializeToString(deterministic=True).hex() for odd in (True, False)] for name, kind in published.messages.items()}
    json.dump({"methods": methods, "messages": filled}, sys.stdout)


if __name__ == "__main__":
    main()
