#include "vector_ops.h"

#include "dispatch.h"
#include "instruction_sets.h"

namespace bdk {

const VectorOps& vector_ops() {
  const InstructionSet* chosen = instruction_set(chosen_instruction_set());
#if defined(BDK_X86)
  if (chosen == &kAvxVnni || chosen == &kAvx2) return kAvx2Ops;
  if (chosen != &kScalar) return kAvx512Ops;
#elif defined(BDK_NEON)
  if (chosen != &kScalar) return kNeonOps;
#else
  static_cast<void>(chosen);
#endif
  return kScalarOps;
}

}  // namespace bdk
