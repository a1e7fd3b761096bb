// The nodes of a graph that run on the CPU, where all of it does: list_nodes_on_cpu ONNXRUNTIME GRAPH > nodes. A line a
// node: its name, a tab, its operator.
#include <exception>
#include <iostream>

#include "ort/library.h"
#include "ort/placement.h"
#include "ort/providers.h"

using namespace gircse::core;

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  try {
    const OnnxRuntime &runtime = load_onnxruntime(argv[1]);
    const OrtApi &api = *runtime.api;
    const auto options = session_options(runtime, "cpu", 1, false);
    check_status(api, api.AddSessionConfigEntry(options.get(), kRecordPlacement, "1"));
    const auto session = create_owned(api, api.ReleaseSession, [&](OrtSession **created) {
      return api.CreateSession(runtime.env, argv[2], options.get(), created);
    });
    for (const PlacedNode &node : nodes_on_cpu(api, session.get())) {
      std::cout << node.name << '\t' << node.op_type << '\n';
    }
  } catch (const std::exception &error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
