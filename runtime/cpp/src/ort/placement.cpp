#include "ort/placement.h"

#include <cstddef>
#include <cstring>
#include <set>
#include <sstream>

namespace gircse::core {
namespace {

constexpr const char *kCpu = "CPUExecutionProvider";
constexpr std::size_t kNamed = 5;

// Functions of version 24 of the C interface, which every supported release has and Debian's header of 1.21 does not. A
// release only adds to the end of the interface, so a place in it is as good as a name; the tests ask the oldest release
// and the newest.
enum Place : std::size_t {
  kSessionGetEpGraphAssignmentInfo = 407,
  kEpAssignedSubgraphGetEpName = 408,
  kEpAssignedSubgraphGetNodes = 409,
  kEpAssignedNodeGetName = 410,
  kEpAssignedNodeGetOperatorType = 412,
};

#if ORT_API_VERSION >= 24
static_assert(offsetof(OrtApi, Session_GetEpGraphAssignmentInfo) == kSessionGetEpGraphAssignmentInfo * sizeof(void *));
static_assert(offsetof(OrtApi, EpAssignedNode_GetOperatorType) == kEpAssignedNodeGetOperatorType * sizeof(void *));
#endif

// A list of objects that belong to another one, and a property of an object.
using GetList = OrtStatus *(ORT_API_CALL *)(const void *owner, const void *const **objects, std::size_t *count);
using GetText = OrtStatus *(ORT_API_CALL *)(const void *object, const char **text);

template <class Function>
Function function_at(const OrtApi &api, Place place) {
  static_assert(sizeof(Function) == sizeof(void *));
  Function function = nullptr;
  std::memcpy(&function, reinterpret_cast<const void *const *>(&api) + place, sizeof function);
  return function;
}

std::vector<const void *> list(const OrtApi &api, Place place, const void *owner) {
  const void *const *objects = nullptr;
  std::size_t count = 0;
  check_status(api, function_at<GetList>(api, place)(owner, &objects, &count));
  return std::vector<const void *>(objects, objects + count);  // braces would make a list of the two pointers
}

std::string text(const OrtApi &api, Place place, const void *object) {
  const char *found = nullptr;
  check_status(api, function_at<GetText>(api, place)(object, &found));
  return found == nullptr ? "" : found;
}

}  // namespace

std::vector<PlacedNode> nodes_on_cpu(const OrtApi &api, const OrtSession *session) {
  std::vector<PlacedNode> nodes;
  for (const void *subgraph : list(api, kSessionGetEpGraphAssignmentInfo, session)) {
    if (text(api, kEpAssignedSubgraphGetEpName, subgraph) != kCpu) continue;
    for (const void *node : list(api, kEpAssignedSubgraphGetNodes, subgraph)) {
      nodes.push_back({text(api, kEpAssignedNodeGetName, node), text(api, kEpAssignedNodeGetOperatorType, node)});
    }
  }
  return nodes;
}

std::string fallback_warning(const std::string &graph, const std::vector<PlacedNode> &nodes,
                             const std::string &size_nodes) {
  if (size_nodes.empty()) return {};
  std::set<std::string> sizes;
  std::istringstream listed(size_nodes);
  for (std::string name; std::getline(listed, name, ',');) sizes.insert(name);
  std::string named;
  std::size_t count = 0;
  for (const PlacedNode &node : nodes) {
    if (sizes.count(node.name) > 0 || ++count > kNamed) continue;
    named += (named.empty() ? "" : ", ") + node.op_type + " (" + node.name + ")";
  }
  if (count == 0) return {};
  if (count > kNamed) named += " and " + std::to_string(count - kNamed) + " more";
  return graph + ": without a kernel on the GPU, these nodes run on the CPU, which is slow: " + named;
}

}  // namespace gircse::core
