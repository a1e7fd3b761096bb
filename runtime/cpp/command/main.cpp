// The frame of gircse-embed-cpp: signals, exit codes, one line for an error.
#include "arguments.h"
#include "atomic_file.h"
#include "command_error.h"
#include "embed.h"
#include "standard_streams.h"

#include <unistd.h>

#include <csignal>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

namespace gircse::command {
namespace {

// Exit codes: 0 done, 1 the self-test failed, and these.
constexpr int kExitError = 2;
constexpr int kExitInterrupted = 130;
constexpr int kExitPipeClosed = 141;

extern "C" void interrupt(int /*signal*/) {
  constexpr char kMessage[] = "gircse-embed-cpp: interrupted\n";
  delete_scratch_file();
  const auto written = write(STDERR_FILENO, kMessage, std::strlen(kMessage));
  static_cast<void>(written);  // where stderr cannot be written, the exit code remains
  _exit(kExitInterrupted);
}

// Output that cannot be written becomes an error of write instead of a signal, and Ctrl-C leaves no file behind. Where
// Ctrl-C is ignored, as in a shell's background, it stays so.
void handle_signals() {
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  if (std::signal(SIGINT, interrupt) == SIG_IGN) std::signal(SIGINT, SIG_IGN);
}

int run(const std::vector<std::string> &words) {
  try {
    const Arguments arguments = parse_arguments(words);
    if (!arguments.help) return embed(arguments);
    write_stdout(help_text());
    return 0;
  } catch (const UsageError &error) {
    write_stderr(usage_text());
    log_line(std::string("error: ") + error.what());
  } catch (const PipeClosed &) {
    return kExitPipeClosed;
  } catch (const std::bad_alloc &) {
    log_line("error: memory ran out");
  } catch (const std::exception &error) {
    log_line(std::string("error: ") + error.what());
  }
  return kExitError;
}

}  // namespace
}  // namespace gircse::command

int main(int argc, char **argv) {
  gircse::command::guard_standard_streams();
  gircse::command::handle_signals();
  return gircse::command::run({argv + (argc > 0 ? 1 : 0), argv + argc});
}
