"""The cluster's autoscaler, asked whether it can bring what is not there.

Ray tells nobody which nodes an autoscaler may add. But version 2 answers a request for resources: it starts the nodes,
or says that no number of nodes that it is allowed would do, and then starts none.
"""

import time
from collections.abc import Sequence

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.sdk import request_resources
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

from pipeline.errors import ConfigError

Bundle = dict[str, float]
"""Resources that have to be on one node, e.g. `{"CPU": 1.0, "GPU": 1.0}`."""

_NODE_GROUP = "ray.io/node-group"
_ANSWER_S = 60.0
_LOOK_AGAIN_S = 0.2


def is_autoscaled() -> bool:
    """Whether something adds nodes to this cluster; they carry the label of their group then."""
    return any(_NODE_GROUP in (node["Labels"] or {}) for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]


def can_bring(bundles: Sequence[Bundle]) -> bool:
    """Return whether the autoscaler can make the cluster hold `bundles` all at once, and let it begin if so.

    What is there counts, in use or not. False where there is no autoscaler. Raises ConfigError if it does not answer.
    """
    if not is_autoscaled():
        return False
    request_resources(bundles=list(bundles))
    try:
        return _answer()
    finally:
        # A request stands until the next one, and would hold its nodes for ever. Actors that wait ask for themselves.
        request_resources(bundles=[])


def _answer() -> bool:
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    asked = _status(client).cluster_resource_state.cluster_resource_state_version
    deadline = time.monotonic() + _ANSWER_S
    while (state := _status(client).autoscaling_state).last_seen_cluster_resource_state_version < asked:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"the cluster is too small for this job, and its autoscaler has not said within {_ANSWER_S:g} s "
                "whether it can add nodes. Only version 2 answers (RAY_enable_autoscaler_v2=1 on the head node); "
                "`ray status` shows what it does. Or start the nodes first."
            )
        time.sleep(_LOOK_AGAIN_S)
    return not state.infeasible_cluster_resource_constraints


def _status(client: GcsClient) -> GetClusterStatusReply:
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status())
    return reply
