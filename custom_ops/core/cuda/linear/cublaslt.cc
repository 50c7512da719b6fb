// Opens cuBLASLt and keeps one handle per device.
#include "core/cuda/linear/cublaslt.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace pfa {
namespace cuda {
namespace cublaslt {
namespace {

std::atomic<void*> given_library{nullptr};

void* open_library() {
  if (void* library = given_library.load()) return library;
  const char* names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11"};
  for (int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
    for (const char* name : names) {
      if (void* library = dlopen(name, mode)) return library;
    }
  }
  throw std::runtime_error(
      "cuBLASLt was not found: none of libcublasLt.so.13, .12 and .11 is loaded or on the loader's search path");
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  void* symbol = dlsym(library, name);
  if (!symbol) throw std::runtime_error(std::string("cuBLASLt has no function ") + name);
  function = reinterpret_cast<Function>(symbol);
}

Api load() {
  void* library = open_library();
  Api api;
  find(library, "cublasLtCreate", api.create);
  find(library, "cublasLtMatmulDescCreate", api.desc_create);
  find(library, "cublasLtMatmulDescDestroy", api.desc_destroy);
  find(library, "cublasLtMatmulDescSetAttribute", api.desc_set);
  find(library, "cublasLtMatrixLayoutCreate", api.layout_create);
  find(library, "cublasLtMatrixLayoutDestroy", api.layout_destroy);
  find(library, "cublasLtMatmulPreferenceCreate", api.preference_create);
  find(library, "cublasLtMatmulPreferenceDestroy", api.preference_destroy);
  find(library, "cublasLtMatmulPreferenceSetAttribute", api.preference_set);
  find(library, "cublasLtMatmulAlgoGetHeuristic", api.heuristic);
  find(library, "cublasLtMatmulAlgoConfigGetAttribute", api.algorithm_get);
  find(library, "cublasLtMatmul", api.matmul);
  return api;
}

}  // namespace

const Api& api() {
  static const Api loaded = load();
  return loaded;
}

void set_library(void* library) { given_library.store(library); }

Handle handle(int device) {
  static std::mutex mutex;
  static std::vector<Handle> handles;
  std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(device) >= handles.size()) handles.resize(device + 1, nullptr);
  if (!handles[device]) check(api().create(&handles[device]), "cublasLtCreate");
  return handles[device];
}

void check(Status status, const char* call) {
  if (status != 0) throw std::runtime_error(std::string(call) + " failed with cuBLAS status " + std::to_string(status));
}

}  // namespace cublaslt
}  // namespace cuda
}  // namespace pfa
