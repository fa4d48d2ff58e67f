#define BDK_AVX_VNNI
#include "tile_avx2.inl"

namespace bdk {

const InstructionSet kAvxVnni = {"avx-vnni", kBlockTokens, kFloatTokens, quantize_token, stage_token,
                                 int8_tile,  float_tile,   read,         multiply_add};

}  // namespace bdk
