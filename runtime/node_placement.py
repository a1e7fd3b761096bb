"""Which nodes of a graph ONNX Runtime left on the CPU although a GPU runs it.

A node without a kernel on the GPU falls back to the CPU: what it reads is copied there in every pass, and the GPU
waits. The vectors stay right, so nothing else would show it. Sizes are another matter: ONNX Runtime computes them on
the CPU on purpose, because kernels are launched from there. The export writes which nodes do that into the graph.
"""

import logging
from typing import Any

from gircse.runtime.tensor_names import SIZE_NODES_KEY

logger = logging.getLogger(__name__)

RECORD_PLACEMENT = ("session.record_ep_graph_assignment_info", "1")
"""Entry of ``SessionOptions`` without which a session does not know where its nodes run."""

_CPU = "CPUExecutionProvider"
_NAMED = 5


def nodes_on_cpu(session: Any) -> dict[str, str]:
    """Return the operators, by node, of what a session runs on the CPU.

    Args:
        session: ``onnxruntime.InferenceSession`` with ``RECORD_PLACEMENT``.
    """
    subgraphs = session.get_provider_graph_assignment_info()
    return {
        node.name: node.op_type for subgraph in subgraphs if subgraph.ep_name == _CPU for node in subgraph.get_nodes()
    }


def warn_of_fallback(session: Any, where: str) -> None:
    """Log a warning that names the nodes of a GPU's session that run on the CPU, those of sizes left out.

    Args:
        session: ``onnxruntime.InferenceSession`` with ``RECORD_PLACEMENT``.
        where: the graph, for the warning.
    """
    listed = session.get_modelmeta().custom_metadata_map.get(SIZE_NODES_KEY)
    if listed is None:
        return  # an older export, which does not say what its nodes are for
    sizes = set(listed.split(","))
    fallen = [f"{operator} ({name})" for name, operator in nodes_on_cpu(session).items() if name not in sizes]
    if fallen:
        more = f" and {len(fallen) - _NAMED} more" if len(fallen) > _NAMED else ""
        logger.warning(
            "%s: without a kernel on the GPU, these nodes run on the CPU, which is slow: %s%s",
            where,
            ", ".join(fallen[:_NAMED]),
            more,
        )
