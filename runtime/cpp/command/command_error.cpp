#include "command_error.h"

#include "error.h"

#include <cerrno>
#include <system_error>

namespace gircse::command {

CommandError::CommandError(const std::string &where, const std::string &got, const std::optional<std::string> &expected,
                           const std::optional<std::string> &hint)
    : std::runtime_error(core::sentence(where, got, expected, hint)) {}

std::string system_message() { return std::generic_category().message(errno); }

}  // namespace gircse::command
