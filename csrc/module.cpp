// The Python side of a library. Importing the CPU's runs the registrations of its other files; the others' do
// so when their register() is called.
#include <Python.h>
#include <torch/headeronly/version.h>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif
#if defined(USE_CUDA) || defined(FASTGEN_CUDA_HOST)
#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>
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

#if defined(USE_CUDA) || defined(FASTGEN_CUDA_HOST)
#ifdef USE_CUDA
constexpr const char *space = "fastgen", *key = "CUDA";
#else
constexpr const char *space = "fastgen_cuda_host", *key = "CPU";
#endif

using Library = torch::stable::detail::StableLibrary;

std::vector<void (*)(Library&)>& kernels() {
  static std::vector<void (*)(Library&)> list;
  return list;
}

static PyObject* register_kernels(PyObject*, PyObject*) {
  static std::vector<std::unique_ptr<Library>> registered;
  if (!registered.empty()) Py_RETURN_NONE;
  try {
    for (const auto& add : kernels()) {
      registered.push_back(std::make_unique<Library>(Library::Kind::IMPL, space, key, __FILE__, __LINE__));
      add(*registered.back());
    }
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"register", register_kernels, METH_NOARGS, nullptr}, {}};
#else
static PyMethodDef methods[] = {{}};
#endif
}  // namespace fastgen

PyMODINIT_FUNC JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, STRING(TORCH_EXTENSION_NAME), nullptr, -1,
                                   fastgen::methods};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "build", fastgen::build) < 0) return nullptr;
  return module;
}
