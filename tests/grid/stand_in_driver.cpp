// A stand-in for the CUDA driver: it "loads" any image and runs the kernel's own code, built for the host, over the
// emulated grid in host memory. It is as strict as the driver about contexts, and fails on demand. stand_in.py uses it.
#include <cstdint>
#include <cstring>
#include <string>

#include "../../csrc/table.h"

using namespace fused_ema;

namespace {

constexpr int kInvalidValue = 1, kInvalidContext = 201, kInvalidImage = 200, kNotFound = 500;

char contexts[8];                      // one for each device
thread_local void* context = nullptr;  // of this thread
std::string failing;                   // the call that fails, with this code
int failure = 0, passing = 0;
int launches = 0, loads = 0;

int result(const char* call) { return failing == call && --passing < 0 ? failure : 0; }

template <Op kOp>
void run(const Launch& launch, uint32_t count) {
  for (uint32_t block = 0; block < count; ++block)
    for (int thread = 0; thread < kThreads; ++thread) run_block<kOp>(launch, block, thread);
}

}  // namespace

extern "C" {

// From now on this call fails, after it has passed some times.
void stand_in_fail(const char* call, int code, int after) { failing = call, failure = code, passing = after; }
int stand_in_launches() { return launches; }
int stand_in_loads() { return loads; }

int cuDriverGetVersion(int* version) {
  *version = 99000;
  return result("cuDriverGetVersion");
}
int cuGetErrorName(int code, const char** name) {
  *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : nullptr;
  return *name ? 0 : kInvalidValue;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 700 ? "an illegal memory access was encountered" : nullptr;
  return *text ? 0 : kInvalidValue;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return result("cuDeviceGet");
}
int cuDevicePrimaryCtxRetain(void** primary, int device) {
  *primary = contexts + device;
  return result("cuDevicePrimaryCtxRetain");
}
int cuCtxGetCurrent(void** current) {
  *current = context;
  return result("cuCtxGetCurrent");
}
int cuCtxSetCurrent(void* wanted) {
  context = wanted;
  return result("cuCtxSetCurrent");
}
int cuModuleLoadData(void** module, const void* image) {
  if (!context) return kInvalidContext;
  if (std::memcmp(image, "\177ELF", 4) != 0) return kInvalidImage;
  *module = context;
  ++loads;
  return result("cuModuleLoadData");
}
// A function's number is that of its operation, plus 1.
int cuModuleGetFunction(void** function, void* module, const char* name) {
  const char* const op = std::strstr(name, "2OpE");
  if (!op || module != context) return kNotFound;
  *function = reinterpret_cast<void*>(intptr_t(op[4] - '0' + 1));
  return result("cuModuleGetFunction");
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned, void*, void** arguments, void**) {
  if (!context) return kInvalidContext;
  if (const int code = result("cuLaunchKernel")) return code;
  Launch launch;
  std::memcpy(&launch, arguments[0], sizeof(launch));
  if (grid_y != 1 || grid_z != 1 || block_x != kThreads || block_y != 1 || block_z != 1 || grid_x != blocks(launch))
    return kInvalidValue;
  ++launches;
  switch (static_cast<Op>(reinterpret_cast<intptr_t>(function) - 1)) {
    case Op::update: return run<Op::update>(launch, grid_x), 0;
    case Op::copy: return run<Op::copy>(launch, grid_x), 0;
    case Op::swap: return run<Op::swap>(launch, grid_x), 0;
    case Op::restore: return run<Op::restore>(launch, grid_x), 0;
    case Op::update_stochastic: return run<Op::update_stochastic>(launch, grid_x), 0;
    case Op::update_finite: return run<Op::update_finite>(launch, grid_x), 0;
    case Op::update_stochastic_finite: return run<Op::update_stochastic_finite>(launch, grid_x), 0;
  }
  return kNotFound;
}

}  // extern "C"
