#include "op/errors.h"

#include "paddle/extension.h"

namespace pfa::op {

void raise([[maybe_unused]] const char* op, const common::ErrorSummary& error) {
#ifdef PADDLE_THROW
  throw common::enforce::EnforceNotMet(error, op, 0);
#else  // Paddle 2.6 has it in a header that asks for cuDNN's
  PD_THROW(error.to_string());
#endif
}

}  // namespace pfa::op
