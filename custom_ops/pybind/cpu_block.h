// The CPU half of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace pfa {

void bind_cpu(pybind11::module_& module);

}  // namespace pfa
