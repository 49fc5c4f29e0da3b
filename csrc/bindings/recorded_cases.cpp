// The CPU backend without torch: the calls that record_cases.py has written, by the real bindings
// and kernels with stand-ins for the few functions of torch's that they ask.
//   recorded_cases FILE
// Each result is held to its truth and bounds, as tests/accuracy.py does. The last line sums up;
// the exit status is 1 where a result is beyond its bounds or no case was there.
#include <omp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>

#include "cpu.cpp"

struct AtenTensorOpaque {
  ScalarType dtype;
  std::vector<int64_t> sizes, strides;
  std::shared_ptr<std::vector<char>> storage;
  int64_t offset = 0;  // elements
};

namespace {

using Tensors = std::vector<Tensor>;

constexpr int kSuccess = 0, kFailure = 1;

size_t bytes_of(ScalarType type) { return aoti_torch_dtype_element_size(static_cast<int>(type)); }

char* data_at(const AtenTensorOpaque* x, int64_t element) {
  return x->storage->data() + (x->offset + element) * bytes_of(x->dtype);
}

AtenTensorHandle made(ScalarType type, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  int64_t last = 0;
  bool empty = false;
  for (size_t d = 0; d < sizes.size(); ++d)
    last += (sizes[d] - 1) * strides[d], empty |= sizes[d] == 0;
  const size_t bytes = empty ? 0 : (last + 1) * bytes_of(type);
  return new AtenTensorOpaque{type, sizes, strides,
                              std::make_shared<std::vector<char>>(bytes, '\xff')};  // NaN
}

template <class T>
T at(const char* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}

double number(const char* p, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return at<float>(p);
    case ScalarType::Double:
      return at<double>(p);
    case ScalarType::BFloat16:
      return static_cast<float>(at<torch::headeronly::BFloat16>(p));
    case ScalarType::Half:
      return static_cast<float>(at<torch::headeronly::Half>(p));
    default:
      std::abort();
  }
}

void write_number(double x, char* p, ScalarType type) {
  const auto put = [&](auto y) { memcpy(p, &y, sizeof y); };
  switch (type) {
    case ScalarType::Float:
      return put(static_cast<float>(x));
    case ScalarType::BFloat16:
      return put(torch::headeronly::BFloat16(static_cast<float>(x)));
    case ScalarType::Half:
      return put(torch::headeronly::Half(static_cast<float>(x)));
    default:
      std::abort();
  }
}

// Calls f(index) for every element, in order; the index has a place for each dimension.
template <class Function>
void for_each(const std::vector<int64_t>& sizes, Function f) {
  for (const int64_t size : sizes)
    if (size == 0) return;
  std::vector<int64_t> index(sizes.size());
  for (;;) {
    f(index);
    size_t d = sizes.size();
    while (d > 0 && ++index[d - 1] == sizes[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

char* element(const AtenTensorOpaque* x, const std::vector<int64_t>& index) {
  int64_t place = 0;
  for (size_t d = 0; d < index.size(); ++d) place += index[d] * x->strides[d];
  return data_at(x, place);
}

Tensor plane_of(const Tensor& x, int64_t plane) {
  auto* part = new AtenTensorOpaque(*x.get());
  part->offset += plane * part->strides[0];
  part->sizes.erase(part->sizes.begin()), part->strides.erase(part->strides.begin());
  return Tensor(part);
}

// What record_cases.py has written.
class Reader {
 public:
  explicit Reader(const char* name) : in_(name, std::ios::binary) {
    std::string line;
    std::getline(in_, line);
    if (line != "attnfast recorded cases 1") fail("no file of recorded cases");
  }

  bool at_end() { return in_.peek() == EOF; }
  int64_t integer() { return plain<int64_t>(); }
  double real() { return plain<double>(); }
  std::string text() {
    std::string text(integer(), ' ');
    bytes(text.data(), text.size());
    return text;
  }
  std::vector<int64_t> integers(int64_t count) {
    std::vector<int64_t> all(count);
    for (int64_t& x : all) x = integer();
    return all;
  }
  void bytes(void* to, size_t count) {
    if (!in_.read(static_cast<char*>(to), count)) fail("the file ends early");
  }

  // An argument of a call; the results of the case's earlier calls may be among them.
  template <class T>
  T argument(const std::vector<Tensors>& earlier) {
    const int64_t kind = integer();
    if constexpr (std::is_same_v<T, OptionalTensor>) {
      if (kind == kNothing) return std::nullopt;
      return tensor(kind, earlier);
    } else if constexpr (std::is_same_v<T, Tensor>) {
      return tensor(kind, earlier);
    } else {
      const int64_t wanted = std::is_same_v<T, bool>     ? kFlag
                             : std::is_same_v<T, double> ? kReal
                                                         : kInteger;
      if (kind != wanted) fail("an argument of another kind");
      if constexpr (std::is_same_v<T, double>) return real();
      return static_cast<T>(integer());
    }
  }

  [[noreturn]] static void fail(const char* why) {
    std::fprintf(stderr, "recorded_cases: %s\n", why);
    std::exit(2);
  }

 private:
  enum Kind { kNothing, kTensor, kResult, kInteger, kReal, kFlag };

  template <class T>
  T plain() {
    T x;
    bytes(&x, sizeof x);
    return x;
  }

  Tensor tensor(int64_t kind, const std::vector<Tensors>& earlier) {
    if (kind == kResult) {
      const int64_t call = integer(), result = integer(), plane = integer();
      const Tensor& whole = earlier.at(call).at(result);
      return plane < 0 ? whole : plane_of(whole, plane);
    }
    if (kind != kTensor) fail("an argument of another kind");
    const auto type = static_cast<ScalarType>(integer());
    const int64_t dim = integer();
    const std::vector<int64_t> sizes = integers(dim), strides = integers(dim);
    AtenTensorHandle x = made(type, sizes, strides);
    if (static_cast<int64_t>(x->storage->size()) != integer()) fail("a tensor of another size");
    bytes(x->storage->data(), x->storage->size());
    return Tensor(x);
  }

  std::ifstream in_;
};

// An operator's results, with arguments as they are written.
template <class Results, class... Arguments>
Tensors call(Results (*op)(Arguments...), Reader& in, const std::vector<Tensors>& earlier) {
  std::tuple<std::decay_t<Arguments>...> arguments{
      in.argument<std::decay_t<Arguments>>(earlier)...};
  const Results results = std::apply(op, arguments);
  if constexpr (std::is_same_v<Results, Tensor>) {
    return {results};
  } else {
    return std::apply([](const auto&... each) { return Tensors{each...}; }, results);
  }
}

Tensors call(const std::string& op, Reader& in, const std::vector<Tensors>& earlier) {
  if (op == "fwd") return call(cpu_fwd, in, earlier);
  if (op == "bwd") return call(cpu_bwd, in, earlier);
  if (op == "decode") return call(cpu_decode, in, earlier);
  if (op == "pooled") return call(cpu_pooled, in, earlier);
  Reader::fail("an unknown operator");
}

struct Tally {
  int cases = 0, calls = 0, results = 0, failed = 0;
  double worst = 0;  // errors as shares of their bounds

  // Reads what is wanted of a result and says whether that is what it is.
  void compare(const Tensor& x, const std::string& name, Reader& in) {
    const auto type = static_cast<ScalarType>(in.integer());
    const std::vector<int64_t> sizes = in.integers(in.integer());
    const double bound_max = in.real(), bound_mean = in.real();
    ++results;
    const bool fits = x.get()->dtype == type && x.get()->sizes == sizes;
    double most = 0, sum = 0;
    int64_t finite = 0, misplaced = 0;
    for_each(sizes, [&](const std::vector<int64_t>& index) {
      const double truth = in.real();
      if (!fits) return;
      const double found = number(element(x.get(), index), type);
      if (!std::isfinite(truth) || !std::isfinite(found)) {
        misplaced += !(found == truth || (std::isnan(found) && std::isnan(truth)));
        return;
      }
      most = std::max(most, std::abs(found - truth));
      sum += std::abs(found - truth), ++finite;
    });
    const double mean = finite ? sum / finite : 0;
    if (fits && !misplaced && most <= bound_max && mean <= bound_mean) {
      if (finite) worst = std::max({worst, most / bound_max, mean / bound_mean});
      return;
    }
    ++failed;
    std::printf("%s: ", name.c_str());
    if (!fits) {
      std::printf("another shape or dtype\n");
    } else {
      std::printf(
          "%ld NaN or Inf out of place; max error %.3g, bound %.3g; mean %.3g, bound %.3g\n",
          static_cast<long>(misplaced), most, bound_max, mean, bound_mean);
    }
  }

  void run(Reader& in) {
    enum { kCase, kCall };
    std::string name;
    std::vector<Tensors> earlier;
    while (!in.at_end()) {
      if (in.integer() == kCase) {
        name = in.text();
        earlier.clear();
        ++cases;
        continue;
      }
      const std::string op = in.text();
      earlier.push_back(call(op, in, earlier));
      ++calls;
      for (int64_t left = in.integer(); left > 0; --left) {
        const int64_t result = in.integer(), plane = in.integer();
        const std::string of_result = name + " " + op + " " + in.text();
        const Tensor& whole = earlier.back().at(result);
        compare(plane < 0 ? whole : plane_of(whole, plane), of_result, in);
      }
    }
  }
};

}  // namespace

extern "C" {

AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t, int32_t, AtenTensorHandle* x) {
  *x = made(static_cast<ScalarType>(dtype), {sizes, sizes + dim}, {strides, strides + dim});
  return kSuccess;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle x, AtenTensorHandle* copy) {
  *copy = new AtenTensorOpaque(*x);
  return kSuccess;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle x) {
  delete x;
  return kSuccess;
}
AOTITorchError aoti_torch_aten_fill__Scalar(AtenTensorHandle x, double value) {
  for_each(x->sizes, [&](const auto& index) { write_number(value, element(x, index), x->dtype); });
  return kSuccess;
}
AOTITorchError torch_call_dispatcher(const char* op, const char*, StableIValue* stack, uint64_t) {
  using torch::stable::detail::to;
  const std::string name = op;
  AtenTensorHandle x = to<AtenTensorHandle>(stack[0]);
  if (name == "aten::zero_") return aoti_torch_aten_fill__Scalar(x, 0.0);
  if (name == "aten::select" && to<int64_t>(stack[1]) == 0) {
    x->offset += to<int64_t>(stack[2]) * x->strides[0];
    x->sizes.erase(x->sizes.begin()), x->strides.erase(x->strides.begin());
    return kSuccess;
  }
  if (name != "aten::copy_") return kFailure;
  const Tensor from(to<AtenTensorHandle>(stack[1]));
  for_each(x->sizes, [&](const auto& index) {
    write_number(number(element(from.get(), index), from.get()->dtype), element(x, index),
                 x->dtype);
  });
  return kSuccess;
}

AOTITorchError aoti_torch_get_dim(AtenTensorHandle x, int64_t* dim) {
  *dim = x->sizes.size();
  return kSuccess;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle x, int64_t d, int64_t* size) {
  *size = x->sizes.at(d);
  return kSuccess;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle x, int64_t d, int64_t* stride) {
  *stride = x->strides.at(d);
  return kSuccess;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle x, int64_t** sizes) {
  *sizes = x->sizes.data();
  return kSuccess;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle x, int64_t** strides) {
  *strides = x->strides.data();
  return kSuccess;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle x, int64_t* count) {
  *count = 1;
  for (const int64_t size : x->sizes) *count *= size;
  return kSuccess;
}
AOTITorchError aoti_torch_get_storage_offset(AtenTensorHandle x, int64_t* offset) {
  *offset = x->offset;
  return kSuccess;
}
AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle x, int64_t* bytes) {
  *bytes = x->storage->size();
  return kSuccess;
}
size_t aoti_torch_dtype_element_size(int32_t dtype) {
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Bool:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Long:
    case ScalarType::Double:
      return 8;
    default:
      return 4;
  }
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle x, int32_t* dtype) {
  *dtype = static_cast<int32_t>(x->dtype);
  return kSuccess;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = 0;
  return kSuccess;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* device) {
  *device = -1;
  return kSuccess;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle x, bool* is) {
  int64_t next = 1;
  *is = true;
  for (size_t d = x->sizes.size(); d-- > 0;) {
    *is &= x->sizes[d] == 1 || x->strides[d] == next;
    next *= x->sizes[d];
  }
  return kSuccess;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle x, const void** data) {
  *data = data_at(x, 0);
  return kSuccess;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle x, void** data) {
  *data = data_at(x, 0);
  return kSuccess;
}
AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = omp_get_max_threads();
  return kSuccess;
}

AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle*) {
  return kSuccess;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char*,
                                  void (*)(StableIValue*, uint64_t, uint64_t), uint64_t) {
  return kSuccess;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return kSuccess; }
uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }
int32_t aoti_torch_device_type_cpu() { return 0; }

// Named by the inlined headers, not called here.
#define UNUSED(name, ...) \
  AOTITorchError name(__VA_ARGS__) { std::abort(); }
UNUSED(aoti_torch_library_init_def, const char*, const char*, uint32_t, TorchLibraryHandle*)
UNUSED(aoti_torch_library_init_fragment, const char*, const char*, uint32_t, TorchLibraryHandle*)
UNUSED(torch_new_string_handle, const char*, size_t, StringHandle*)

#define DTYPE(name, type) \
  int32_t aoti_torch_dtype_##name() { return static_cast<int32_t>(ScalarType::type); }
DTYPE(bfloat16, BFloat16)
DTYPE(bool, Bool)
DTYPE(complex128, ComplexDouble)
DTYPE(complex32, ComplexHalf)
DTYPE(complex64, ComplexFloat)
DTYPE(float16, Half)
DTYPE(float32, Float)
DTYPE(float64, Double)
DTYPE(float8_e4m3fn, Float8_e4m3fn)
DTYPE(float8_e4m3fnuz, Float8_e4m3fnuz)
DTYPE(float8_e5m2, Float8_e5m2)
DTYPE(float8_e5m2fnuz, Float8_e5m2fnuz)
DTYPE(int16, Short)
DTYPE(int32, Int)
DTYPE(int64, Long)
DTYPE(int8, Char)
DTYPE(uint16, UInt16)
DTYPE(uint32, UInt32)
DTYPE(uint64, UInt64)
DTYPE(uint8, Byte)
}

int main(int count, char** arguments) {
  if (count != 2) Reader::fail("give the file that record_cases.py has written");
  Tally tally;
  try {
    Reader in(arguments[1]);
    tally.run(in);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    ++tally.failed;
  }
  std::printf("%s (of %s): %d cases, %d calls, %d results, %d beyond the rule; worst %.0f %%\n",
              cpu_isa().c_str(), cpu_isas().c_str(), tally.cases, tally.calls, tally.results,
              tally.failed, 100 * tally.worst);
  return tally.failed || !tally.results;
}
