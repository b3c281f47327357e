"""The metric service of libtpu on the published gRPC library, as the runtime of a TPU serves it.

Usage: tpu_runtime.py

Prints the port it listens on. A line of JSON on stdin is what it tells from then on: {metric name: {device number: value}}.
"""

import json
import sys
from concurrent import futures

import grpc

from protobuf_messages import classes

# Names and numbers are those of the published definition.
MESSAGES = {
    "AttrValue": [("string_attr", 1, "string"), ("int_attr", 3, "int64")],
    "Attribute": [("key", 1, "string"), ("value", 2, "AttrValue")],
    "Gauge": [("as_double", 1, "double"), ("as_int", 2, "int64")],
    "Metric": [("attribute", 1, "Attribute"), ("gauge", 3, "Gauge")],
    "TPUMetric": [("name", 1, "string"), ("description", 2, "string"), ("metrics", 3, "Metric*")],
    "MetricRequest": [("metric_name", 1, "string"), ("skip_node_aggregation", 2, "bool")],
    "MetricResponse": [("metric", 1, "TPUMetric")],
}
PACKAGE = "tpu.monitoring.runtime"

API = classes(PACKAGE, MESSAGES)
TOLD = {}


def answer(request, context):
    values = TOLD.get(request.metric_name)
    if values is None:
        context.abort(grpc.StatusCode.NOT_FOUND, "no such metric")
    response = API["MetricResponse"]()
    response.metric.name = request.metric_name
    for number, value in values.items():
        metric = response.metric.metrics.add()
        metric.attribute.key = "device-id"
        metric.attribute.value.int_attr = int(number)
        if isinstance(value, float):
            metric.gauge.as_double = value
        else:
            metric.gauge.as_int = value
    return response


def main():
    method = grpc.unary_unary_rpc_method_handler(answer, request_deserializer=API["MetricRequest"].FromString, response_serializer=lambda told: told.SerializeToString())
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"{PACKAGE}.RuntimeMetricService", {"GetRuntimeMetric": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        TOLD.clear()
        TOLD.update(told)
    server.stop(0)


if __name__ == "__main__":
    main()
