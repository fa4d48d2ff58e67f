#include "tile_avx512.inl"

namespace bdk {

const InstructionSet kAvx512Vnni = {"avx512-vnni", kBlockTokens, kFloatTokens, quantize_token, stage_token,
                                    int8_tile,     float_tile,   read,         multiply_add};

}  // namespace bdk
