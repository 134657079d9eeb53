// The Python side of a library: importing it runs the registrations of its other files.
#include <Python.h>
#include <torch/headeronly/version.h>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

#define STRING_(...) #__VA_ARGS__
#define STRING(...) STRING_(__VA_ARGS__)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace fastgen {
#ifdef USE_CUDA
extern const char* const build =
    "torch " TORCH_VERSION ", CUDA " STRING(CUDART_VERSION) ", sm " STRING(FASTGEN_ARCHS) ", " __VERSION__;
#else
extern const char* const build = "torch " TORCH_VERSION ", compiler " __VERSION__;
#endif
}  // namespace fastgen

PyMODINIT_FUNC JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, STRING(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "build", fastgen::build) < 0) return nullptr;
  return module;
}
