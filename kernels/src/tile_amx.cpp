#define BDK_VBMI
#define BDK_AMX
#include "tile_avx512.inl"

namespace bdk {

const InstructionSet kAmxInt8 = {"amx-int8", kBlockTokens, kFloatTokens, quantize_token,        stage_token,
                                 int8_tile,  float_tile,   read,         multiply_add_matrices, kMatrixTokens};

}  // namespace bdk
