// The CUDA backend's host side with stand-ins for torch, CUDA and GPUs: a line for every call that
// one of them gets. test_cuda_bindings.py compiles it and reads the lines.
//   recorder CALL KIND DEVICE
// Tensors have sizes and strides, and data at addresses that nobody may touch: what reads a value
// on the host ends with SIGSEGV. Bindings, dispatch and the functions that launch are the real
// ones; where kernels would be launched by the emulator, CUDA's launch is called instead.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/cuda.cpp"
#include "cuda/launch_kernel.h"
#include "cuda_runtime_api.h"
#include "emulator/launch.h"

struct AtenTensorOpaque {
  int32_t device_type, device;
  ScalarType dtype;
  std::vector<int64_t> sizes, strides;
  char* data;
};

namespace {

constexpr int32_t kCpu = 0, kGpu = 1;
constexpr int kSuccess = 0;
int current = 1;  // CUDA's current device
std::map<void*, int> guards;

std::vector<std::string>& registered() {  // "key operator"
  static std::vector<std::string> lines;
  return lines;
}

char* untouchable(int64_t bytes) {
  static char* next = static_cast<char*>(
      mmap(nullptr, 1 << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  char* data = next;
  next += (bytes + 255) / 256 * 256;
  return data;
}

AtenTensorHandle made(std::vector<int64_t> sizes, std::vector<int64_t> strides, ScalarType dtype,
                      int32_t device_type, int32_t device) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return new AtenTensorOpaque{device_type, device,  dtype,
                              sizes,       strides, untouchable(8 * (last + 1))};
}

Tensor tensor(int device, ScalarType dtype, std::vector<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return Tensor(made(sizes, strides, dtype, kGpu, device));
}

AtenTensorHandle handle_of(StableIValue x) {
  return torch::stable::detail::to<AtenTensorHandle>(x);
}

void log(const std::string& event, const AtenTensorOpaque* x) {
  std::printf("%s %s %d current %d\n", event.c_str(), x->device_type == kGpu ? "gpu" : "host",
              x->device, current);
}

}  // namespace

void record(const char* function, void* stream) {  // a call of CUDA's runtime
  std::printf("%s to %ld current %d\n", function, reinterpret_cast<long>(stream), current);
}
int current_device() { return current; }

attnfast::emulator::Settings& attnfast::emulator::settings() {
  static Settings instance;  // without PTX
  return instance;
}
void attnfast::emulator::run_ptx(const void*, const Launch&, const Session&, const void*) {
  std::abort();
}

// The emulator's launch. Its session is what the bindings took for the stream.
void attnfast::emulator::run_blocks(Launch launch, const Session& session) {
  void* stream = const_cast<Session*>(&session);
  std::printf("kernel %s\n", launch.kernel.c_str());
  cuda::launch_kernel(nullptr, {launch.kernel, launch.blocks, launch.threads, launch.shared_bytes},
                      stream, nullptr);
}

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new char);
  guards[*guard] = current;
  current = device;
  std::printf("guard gpu %d current %d\n", device, current);
  return kSuccess;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  current = guards.at(guard);
  std::printf("unguard current %d\n", current);
  return kSuccess;
}

AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t device_type, int32_t device,
                                        AtenTensorHandle* made_one) {
  *made_one = made({sizes, sizes + dim}, {strides, strides + dim}, static_cast<ScalarType>(dtype),
                   device_type, device);
  log("empty", *made_one);
  const char* failing = std::getenv("FAILING");
  return failing && std::string(failing) == "empty" ? 1 : kSuccess;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle x, AtenTensorHandle* copy) {
  *copy = new AtenTensorOpaque(*x);
  return kSuccess;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle x) {
  delete x;
  return kSuccess;
}
AOTITorchError aoti_torch_aten_fill__Scalar(AtenTensorHandle x, double) {
  log("fill_", x);
  return kSuccess;
}
AOTITorchError torch_call_dispatcher(const char* op, const char*, StableIValue* stack, uint64_t) {
  const std::string name = op;
  log(name, handle_of(stack[0]));
  if (name == "aten::copy_") {
    log("from", handle_of(stack[1]));
    delete handle_of(stack[1]);
  } else if (name == "aten::select") {  // of the first dimension
    AtenTensorHandle x = handle_of(stack[0]);
    x->sizes.erase(x->sizes.begin()), x->strides.erase(x->strides.begin());
  }
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
AOTITorchError aoti_torch_get_storage_offset(AtenTensorHandle, int64_t* offset) {
  *offset = 0;
  return kSuccess;
}
AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle, int64_t* bytes) {
  *bytes = int64_t{1} << 30;
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
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle x, int32_t* type) {
  *type = x->device_type;
  return kSuccess;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle x, int32_t* device) {
  *device = x->device;
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
  *data = x->data;
  return kSuccess;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle x, void** data) {
  *data = x->data;
  return kSuccess;
}

AOTITorchError aoti_torch_library_init_impl(const char*, const char* key, const char*, uint32_t,
                                            TorchLibraryHandle* library) {
  *library = reinterpret_cast<TorchLibraryHandle>(new std::string(key));
  return kSuccess;
}
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*)(StableIValue*, uint64_t, uint64_t), uint64_t) {
  registered().push_back(*reinterpret_cast<std::string*>(library) + " " + name);
  return kSuccess;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return kSuccess; }
uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }
int32_t aoti_torch_device_type_cpu() { return kCpu; }
int32_t aoti_torch_device_type_cuda() { return kGpu; }

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

}  // extern "C"

namespace {

constexpr ScalarType kBf16 = ScalarType::BFloat16, kFp32 = ScalarType::Float;
constexpr ScalarType kInt64 = ScalarType::Long;

// Inputs of forward and backward: the options as their dtypes make bindings copy them.
struct Inputs {
  Tensor q, k, v;
  OptionalTensor mask, bias, alibi_slopes, sinks, align, dropout_seed, cu_seqlens_q, cu_seqlens_k;
  OptionalTensor windows;
  double softcap = 0.0, dropout_p = 0.0;
  int64_t weights = 0, stats = 0, max_seqlen_q = 0, max_seqlen_k = 0;

  // kind: plain, options, packed or short.
  Inputs(const std::string& kind, int device)
      : q(tensor(device, kBf16, {2, 4, 70, 64})),
        k(tensor(device, kBf16, {2, 2, 130, 64})),
        v(tensor(device, kBf16, {2, 2, 130, 64})) {
    if (kind == "options") {
      mask = tensor(device, ScalarType::Bool, {2, 1, 1, 130});
      windows = tensor(device, kInt64, {4, 2});
      bias = tensor(device, kBf16, {1, 4, 70, 130});
      alibi_slopes = tensor(device, ScalarType::Double, {4});
      sinks = tensor(device, kBf16, {4});
      align = tensor(device, kInt64, {2});
      dropout_seed = tensor(device, kInt64, {2});
      softcap = 3.0, dropout_p = 0.3, weights = 2, stats = 2;
    } else if (kind == "packed") {
      q = tensor(device, kBf16, {1, 4, 70, 64});
      k = v = tensor(device, kBf16, {1, 2, 130, 64});
      cu_seqlens_q = cu_seqlens_k = tensor(device, kInt64, {4});
      stats = 2, max_seqlen_q = 50, max_seqlen_k = 100;
    } else if (kind == "short") {
      q = tensor(device, kBf16, {2, 4, 70, 128});
      k = v = tensor(device, kBf16, {2, 2, 100, 128});
    }
  }
};
#define INPUTS(x)                                                                                  \
  x.q, x.k, x.v, x.mask, x.bias, x.alibi_slopes, x.sinks, x.align, x.dropout_seed, x.cu_seqlens_q, \
      x.cu_seqlens_k, {}, x.windows, {}, {}, {}, 0.1, x.softcap, true, -1, -1, 0, false,           \
      x.dropout_p, x.weights, x.stats, true, x.max_seqlen_q, x.max_seqlen_k

void forward(const std::string& kind, int device) {
  const Inputs x(kind, device);
  cuda_fwd(INPUTS(x));
}

void backward(const std::string& kind, int device) {
  const Inputs x(kind, device);
  const bool options = kind == "options";
  const int64_t B = x.q.size(0), D = x.q.size(3);
  const Tensor out = tensor(device, kBf16, {B, 4, 70, D}), lse = tensor(device, kFp32, {B, 4, 70});
  const Tensor norm = tensor(device, kFp32, {2, B, 4, 70});
  // As sum() gives it: one number at every place.
  const Tensor ones(made({B, 4, 70, D}, {0, 0, 0, 0}, kBf16, kGpu, device));
  OptionalTensor grad_lse, grad_weights;
  if (options) {
    grad_lse = tensor(device, kBf16, {B, 4, 70});
    grad_weights = tensor(device, kBf16, {B, 4, 70, 130});
  }
  const OptionalTensor rows = options ? OptionalTensor(lse) : OptionalTensor();
  cuda_bwd(options ? ones : out, grad_lse, rows, grad_weights, out, norm, rows, options, options,
           INPUTS(x));
}

void decode(const std::string& kind, int device) {
  const Tensor q = tensor(device, kBf16, {2, 4, 1, 64}), lengths = tensor(device, kInt64, {2});
  const bool paged = kind == "paged";
  const Tensor cache =
      paged ? tensor(device, kBf16, {40, 16, 2, 64}) : tensor(device, kBf16, {2, 2, 320, 64});
  OptionalTensor table;
  if (paged) table = tensor(device, kInt64, {2, 20});
  const bool received = kind == "received";
  cuda_decode(q, cache, cache, lengths, table, {}, {}, {}, {}, {}, 0.1, 0.0, -1, -1, received);
}

void pooled(const std::string& kind, int device) {
  const bool distances = kind == "distances";
  const Inputs x(distances ? "packed" : "options", device);
  const Tensor norm = tensor(device, kFp32, {2, x.q.size(0), 4, 70});
  OptionalTensor tokens_q, tokens_k;
  if (distances) {
    tokens_q = tensor(device, kInt64, {1, 70}), tokens_k = tensor(device, kInt64, {1, 130});
  }
  cuda_pooled(INPUTS(x), norm, tokens_q, tokens_k, distances ? 2 : 0, 3, distances ? 66 : 5);
}

void run(const std::string& call, const std::string& kind, int device) {
  if (call == "forward") return forward(kind, device);
  if (call == "backward") return backward(kind, device);
  if (call == "decode") return decode(kind, device);
  if (call == "pooled") return pooled(kind, device);
  if (call == "unusable") {
    std::printf("said %s\n", cuda_unusable(device).c_str());
  } else if (call == "registered") {
    for (const std::string& line : registered()) std::printf("%s\n", line.c_str());
  } else if (call == "peek") {  // what no binding may do
    const Inputs x("options", device);
    std::printf("%ld\n", *static_cast<const int64_t*>(x.dropout_seed->const_data_ptr()));
  }
}

}  // namespace

int main(int, char** argv) {
  try {
    run(argv[1], argv[2], std::atoi(argv[3]));
  } catch (const std::runtime_error& error) {
    std::printf("raised %s\n", error.what());
  }
  std::printf("after: current %d\n", current);
}
