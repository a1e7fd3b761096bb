// Which nodes of a graph ONNX Runtime left on the CPU although a GPU runs it: the vectors stay right, and slow.
#pragma once

#include <string>
#include <vector>

#include "ort/library.h"

namespace gircse::core {

// Without this entry of its options a session does not know where its nodes run.
inline constexpr const char *kRecordPlacement = "session.record_ep_graph_assignment_info";

struct PlacedNode {
  std::string name;
  std::string op_type;
};

// The nodes that a session with kRecordPlacement runs on the CPU; throws OrtFailure.
std::vector<PlacedNode> nodes_on_cpu(const OrtApi &api, const OrtSession *session);

// One line that names the nodes; empty where there are none. Left out are those that compute sizes, which the graph
// lists, separated by commas: ONNX Runtime runs them on the CPU on purpose. An older export lists nothing, and then
// nothing can be said.
std::string fallback_warning(const std::string &graph, const std::vector<PlacedNode> &nodes,
                             const std::string &size_nodes);

}  // namespace gircse::core
