// Makes allocations fail on demand. It is preloaded (LD_PRELOAD) and replaces C++'s operator new and posix_memalign, by
// which PyTorch allocates tensors. Only allocations by the extension's functions, and by what they call, can fail.
#include <dlfcn.h>
#include <execinfo.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

struct Range {
  uintptr_t begin, end;
  bool holds(void* address) const {
    return reinterpret_cast<uintptr_t>(address) >= begin && reinterpret_cast<uintptr_t>(address) < end;
  }
};
Range extension{};  // functions whose allocations can fail
Range spared[64];   // functions among them whose allocations never fail
int spared_count = 0;

thread_local long left = 0;  // allocations of this thread until the one that fails; 0: none fails

bool counts() {
  void* frames[128];
  void** const end = frames + backtrace(frames, 128);
  return std::any_of(frames, end, [](void* frame) { return extension.holds(frame); }) &&
         std::none_of(frames, end, [](void* frame) {
           return std::any_of(spared, spared + spared_count, [=](const Range& each) { return each.holds(frame); });
         });
}

bool fails() { return left > 0 && counts() && --left == 0; }

void* allocate(size_t size, size_t alignment = sizeof(void*)) {
  size = (size + alignment - 1) / alignment * alignment;
  void* const memory = fails() ? nullptr : std::aligned_alloc(alignment, size ? size : alignment);
  return memory ? memory : throw std::bad_alloc();
}

}  // namespace

extern "C" void fail_at(long n) { left = n; }
extern "C" void look_at(uintptr_t begin, uintptr_t end) { extension = {begin, end}; }
extern "C" void spare(uintptr_t begin, uintptr_t end) { spared[spared_count++] = {begin, end}; }
extern "C" long until_failure() { return left; }

extern "C" int posix_memalign(void** memory, size_t alignment, size_t size) noexcept {
  using Function = int (*)(void**, size_t, size_t);
  static const auto original = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  return fails() ? ENOMEM : original(memory, alignment, size);
}

void* operator new(size_t size) { return allocate(size); }
void* operator new[](size_t size) { return allocate(size); }
void* operator new(size_t size, std::align_val_t alignment) { return allocate(size, static_cast<size_t>(alignment)); }
void* operator new[](size_t size, std::align_val_t alignment) { return allocate(size, static_cast<size_t>(alignment)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
