#include "vector_ops.h"

#include "dispatch.h"
#include "instruction_sets.h"

namespace bdk {

const VectorOps& vector_ops() {
#if defined(BDK_X86)
  const InstructionSet* chosen = instruction_set(chosen_instruction_set());
  if (chosen == &kAvx512Vbmi || chosen == &kAvx512Vnni) return kAvx512Ops;
  if (chosen == &kAvxVnni || chosen == &kAvx2) return kAvx2Ops;
#endif
  return kScalarOps;
}

}  // namespace bdk
