// stdin, stdout and stderr, each of which the shell may have closed.
#pragma once

#include <string_view>

namespace gircse::command {

// Takes the numbers of streams that are closed, before a file that is opened gets them and is written to by mistake.
void guard_standard_streams();

bool is_closed(int stream);

// Writes at once. Throws PipeClosed, or CommandError where stdout is closed or has no space.
void write_stdout(std::string_view text);

// Where stderr cannot be written, the exit code remains.
void write_stderr(std::string_view text);

// Writes a line that begins with the name of the command, as Python's logging does.
void log_line(std::string_view message);

}  // namespace gircse::command
