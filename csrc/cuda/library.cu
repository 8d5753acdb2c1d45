// The library itself: the version of its interface, the words for an error, what a device can run.
//
// All functions of the interface are extern "C". Those that launch take the stream as their last
// argument, return 0 or a cudaError_t, and never wait for the device.
#include "runtime.h"

// Changes with every change of a function of the interface: ABI_VERSION in
// lipkernels/kernels/cuda/library.py.
extern "C" int lk_abi_version() { return 1; }

#ifdef LK_SIMT

extern "C" const char* lk_error_name(int code) { return simt::error_name(code); }
extern "C" const char* lk_error_message(int) { return simt::message; }
extern "C" int lk_driver_version() { return 0; }
extern "C" int lk_runtime_version() { return 0; }
extern "C" int lk_check_device(int) { return simt::BAD_LAUNCH; }

#else

extern "C" const char* lk_error_name(int code) { return cudaGetErrorName(cudaError_t(code)); }
extern "C" const char* lk_error_message(int code) { return cudaGetErrorString(cudaError_t(code)); }

// 1000 major + 10 minor; 0: there is none.
extern "C" int lk_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
extern "C" int lk_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

namespace {
// Built for the same devices as every other kernel.
__global__ void probe() {}
}  // namespace

// Whether there is machine code for a device (below 0: the current one); the current one stays so.
extern "C" int lk_check_device(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  const bool other = device >= 0 && device != before;
  if (error == cudaSuccess && other) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    if (other) cudaSetDevice(before);
  }
  if (error != cudaSuccess) cudaGetLastError();  // reported here, so nobody else's
  return error;
}

#endif
