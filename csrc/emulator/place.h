// Where in the kernels' source a primitive was called.
#pragma once
#include <cstring>
#include <string>

namespace attnfast::emulator {

struct Place {
  const char* op = "";  // the primitive: "sync_block"
  const char* file = "";
  int line = 0;

  bool operator==(const Place& other) const {
    return line == other.line && !std::strcmp(op, other.op) && !std::strcmp(file, other.file);
  }
  bool operator!=(const Place& other) const { return !(*this == other); }

  const char* file_name() const {
    const char* slash = std::strrchr(file, '/');
    return slash ? slash + 1 : file;
  }
  // "sync_block at attention_fwd.h:120"
  std::string text() const {
    return std::string(op) + " at " + file_name() + ":" + std::to_string(line);
  }
};

// The last parameters of every primitive: its caller's place, without the caller's doing.
#define ATTNFAST_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

}  // namespace attnfast::emulator
