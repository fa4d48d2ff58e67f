#include "tile_neon.inl"

namespace bdk {

const InstructionSet kNeonDotprod = {"neon-dotprod", kBlockTokens, kFloatTokens, quantize_token, stage_token,
                                     int8_tile,      float_tile,   read,         multiply_add};

}  // namespace bdk
