// The instruction sets of this build.  Each is one translation unit with its own compiler flags; those units share no
// inline library code, because the linker keeps only one copy of such code and could keep the one that needs AVX512.
#pragma once

#include "tile.h"

namespace bdk {

extern const InstructionSet kScalar;
#if defined(BDK_X86)
extern const InstructionSet kAvx2;        // AVX2, FMA, F16C
extern const InstructionSet kAvxVnni;     // those and AVX-VNNI
extern const InstructionSet kAvx512Vnni;  // AVX512 F, BW, DQ, VL, VNNI
extern const InstructionSet kAvx512Vbmi;  // those and VBMI
#if defined(BDK_AMX_BUILT)
extern const InstructionSet kAmxInt8;  // those and AMX with int8
#endif
#elif defined(BDK_NEON)
extern const InstructionSet kNeonDotprod;  // ARMv8.2 with dot products
extern const InstructionSet kNeonI8mm;     // those and int8 matrix multiplication
#endif

}  // namespace bdk
