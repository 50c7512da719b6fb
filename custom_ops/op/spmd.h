// How the operator's tensors are spread over a mesh of processes in Paddle's auto-parallel engine (Paddle 3.x, whose
// custom operators may have such rules): inputs stay sharded over the batch, and the weights over heads where the
// operator holds a part of the heads.
#pragma once

#include "op/attributes.h"
#include "paddle/extension.h"

#if __has_include("paddle/phi/api/ext/spmd_infer.h")
#include "paddle/phi/api/ext/spmd_infer.h"

#define PFA_DIST_TENSOR(Name, name) const phi::distributed::DistMetaTensor& name
#define PFA_DIST_TENSORS PFA_INPUTS(PFA_DIST_TENSOR)

namespace pfa::op {

phi::distributed::SpmdInfo forward_spmd(PFA_DIST_TENSORS, PFA_ATTRIBUTES);
phi::distributed::SpmdInfo forward_alone_spmd(PFA_DIST_TENSORS, PFA_ATTRIBUTES);
phi::distributed::SpmdInfo backward_spmd(PFA_DIST_TENSORS, const phi::distributed::DistMetaTensor& saved,
                                         const phi::distributed::DistMetaTensor& d_out, PFA_ATTRIBUTES);

}  // namespace pfa::op

#define PFA_SPMD_RULE(rule) .SetInferSpmdFn(PD_INFER_SPMD_RULE(rule))
#else
#define PFA_SPMD_RULE(rule)
#endif
