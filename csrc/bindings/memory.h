// What a failed allocation says, and how it comes to Python.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

namespace attnfast::bindings {

// A MemoryError in Python. It has room for its words: there may be none left for them.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(const char* words) { std::strncpy(words_, words, sizeof words_ - 1); }
  const char* what() const noexcept override { return words_; }

 private:
  char words_[256] = {};
};

// "268 MiB"
inline std::string mebibytes(double bytes) {
  return std::to_string(static_cast<long long>(std::ceil(bytes / (1 << 20)))) + " MiB";
}

// "(2, 4, 10)"
inline std::string in_parentheses(const int64_t* numbers, size_t count) {
  std::string text = "(";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + ")";
}

// A boxed operator in which no allocation fails without a word.
template <void (*boxed)(StableIValue*, uint64_t, uint64_t)>
void with_words(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  try {
    boxed(stack, inputs, outputs);
  } catch (const NoMemory&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw NoMemory("attention: no memory for the call's small arrays");
  }
}
#define ATTNFAST_BOX(function) (&attnfast::bindings::with_words<TORCH_BOX(&function)>)

}  // namespace attnfast::bindings
