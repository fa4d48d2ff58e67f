#define BDK_VBMI
#include "tile_avx512.inl"

namespace bdk {

const InstructionSet kAvx512Vbmi = {"avx512-vbmi", kBlockTokens, kFloatTokens, quantize_token, stage_token,
                                    int8_tile,     float_tile,   read,         multiply_add};

}  // namespace bdk
