// Load a kernel of a bundle from C++ with TVM-FFI: no Python, no torch, no compiler.
//
//   flags="$(python -m tvm_ffi.config --cxxflags --ldflags --libs)" lib=$(python -m tvm_ffi.config --libdir)
//   g++ examples/without_torch.cpp $flags -ldl -Wl,-rpath,$lib -o without_torch
//   ./without_torch RUNTIME KERNEL SYMBOL
//
// RUNTIME is libcute_dsl_runtime.so; manifest.json lists file and symbol of every kernel, and cute_ssm_kernels.h their
// arguments. This program calls selective_state_update with tensors in the memory of the CPU, which the kernel refuses
// by name: with pointers of cudaMalloc and kDLCUDA in their place it launches on the stream of TVMFFIEnvSetStream.
#include <dlfcn.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdio>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

// A tensor whose dimensions with stride 0 share their elements, in memory of the CPU.
struct Tensor {
  std::vector<int64_t> shape, strides;
  std::vector<char> memory;
  DLTensor view{};

  Tensor(std::vector<int64_t> shape_, std::vector<int64_t> strides_, DLDataType dtype, size_t elements)
      : shape(std::move(shape_)), strides(std::move(strides_)), memory(elements * dtype.bits / 8 + 64) {
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    view.data = reinterpret_cast<void*>((address + 63) / 64 * 64);
    view.device = {kDLCPU, 0};
    view.ndim = static_cast<int32_t>(shape.size());
    view.dtype = dtype;
    view.shape = shape.data();
    view.strides = strides.data();
  }
  Tensor(Tensor const&) = delete;
};

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s RUNTIME KERNEL SYMBOL\n", argv[0]);
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {  // before the kernel, whose library looks for its functions
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  ffi::Module library = ffi::Module::LoadFromFile(argv[2]);
  ffi::Function kernel = library->GetFunction(argv[3]).value();

  constexpr int64_t slots = 3, nheads = 4, batch = 2, dim = 64, dstate = 128;
  constexpr DLDataType f32{kDLFloat, 32, 1}, f16{kDLFloat, 16, 1}, i32{kDLInt, 32, 1};
  Tensor state({slots, nheads, dim, dstate}, {nheads * dim * dstate, dim * dstate, dstate, 1}, f32,
               slots * nheads * dim * dstate);
  Tensor x({batch, nheads, dim}, {nheads * dim, dim, 1}, f16, batch * nheads * dim);
  Tensor out({batch, nheads, dim}, {nheads * dim, dim, 1}, f16, batch * nheads * dim);
  Tensor dt({batch, nheads, dim}, {nheads, 1, 0}, f32, batch * nheads);  // one value per head
  Tensor A({nheads, dim, dstate}, {1, 0, 0}, f32, nheads);
  Tensor B({batch, 1, dstate}, {dstate, dstate, 1}, f16, batch * dstate);
  Tensor C({batch, 1, dstate}, {dstate, dstate, 1}, f16, batch * dstate);
  Tensor D({nheads, dim}, {1, 0}, f32, nheads);
  Tensor dt_bias({nheads, dim}, {1, 0}, f32, nheads);
  Tensor state_batch_indices({batch}, {1}, i32, batch);
  try {
    kernel(&state.view, &x.view, &dt.view, &A.view, &B.view, &C.view, &D.view, nullptr, &dt_bias.view, &out.view,
           nullptr, &state_batch_indices.view, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
           int64_t(-1), 1, 1);
  } catch (ffi::Error const& error) {
    std::string message = error.message();
    std::printf("refused: %s\n", message.substr(message.rfind(", ") + 2).c_str());
  }
  std::printf("%s is loaded\n", argv[3]);
  return 0;
}
