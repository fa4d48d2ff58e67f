#define BDK_I8MM
#include "tile_neon.inl"

namespace bdk {

const InstructionSet kNeonI8mm = {"neon-i8mm", kBlockTokens, kFloatTokens, quantize_token, stage_token,
                                  int8_tile,   float_tile,   read,         multiply_add};

}  // namespace bdk
