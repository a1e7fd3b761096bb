#include "standard_streams.h"

#include "command_error.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <string>

namespace gircse::command {
namespace {

std::array<bool, 3> closed_streams{};

}  // namespace

void guard_standard_streams() {
  for (int stream = STDIN_FILENO; stream <= STDERR_FILENO; ++stream) {
    if (fcntl(stream, F_GETFD) != -1 || errno != EBADF) continue;
    closed_streams[static_cast<std::size_t>(stream)] = true;
    if (open("/dev/null", O_RDWR) != stream) _exit(2);  // it gets the lowest free number, which is that of the stream
  }
}

bool is_closed(int stream) { return closed_streams[static_cast<std::size_t>(stream)]; }

void write_stdout(std::string_view text) {
  if (is_closed(STDOUT_FILENO)) {
    throw CommandError("stdout", "is closed", std::nullopt, "Redirect it to a file, or name one with a flag.");
  }
  while (!text.empty()) {
    const ssize_t count = write(STDOUT_FILENO, text.data(), text.size());
    if (count >= 0) {
      text.remove_prefix(static_cast<std::size_t>(count));
    } else if (errno == EPIPE) {
      throw PipeClosed();
    } else if (errno != EINTR) {
      throw CommandError("stdout", "cannot be written: " + system_message(), std::nullopt, "Check the free space.");
    }
  }
}

void write_stderr(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stderr); }

void log_line(std::string_view message) { write_stderr("gircse-embed-cpp: " + std::string(message) + "\n"); }

}  // namespace gircse::command
