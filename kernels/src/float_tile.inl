// The product of a tile with fp32 activations; included like int8_tile.inl, before it.  In each 32-bit lane, the code
// of column 4q + b of a plane is shifted down to the low bits, becomes a weight there, and multiplies one activation of
// each token.  A lookup whose index is the low bits of a lane needs no masking.

constexpr int kFloatVectors = kTileRows / kLanes;

// The level of a code, less its zero point and scale, in the 32-bit lanes of `vector` v: byte `byte` of quad `quad`.
template <Coding kCoding>
struct FloatDecoder {
  static constexpr bool kThird = kCoding == Coding::kThreeBit || kCoding == Coding::kNormalFloat;
  static constexpr int kQuads = kThird ? 8 : 4;
  FloatTable table;

  BDK_INLINE explicit FloatDecoder(const TileLayout& layout) : table(float_table(layout.float_levels)) {}

  BDK_INLINE Floats level(const std::uint8_t* step, int quad, int byte, int v) const {
    const std::uint8_t* rows = step + v * 4 * kLanes;
    if constexpr (kCoding == Coding::kTwoBit) {
      return float_level(table, right(load(rows), 8 * byte + 2 * quad));
    } else if constexpr (kThird) {
      const Bytes two = right(load(rows + quad / 4 * kPlaneBytes), 8 * byte + 2 * (quad % 4));
      const Bytes high = load(rows + 2 * kPlaneBytes);
      const int place = 8 * byte + kThirdBitPlaces[quad % 4] + quad / 4 - 2;
      const Bytes third = place < 0 ? left_by(high, -place) : right(high, place);
      return float_level(table, select(3, two, third));
    } else if constexpr (kCoding == Coding::kFourBit) {
      const Bytes plane = load(rows + quad / 2 * kPlaneBytes);
      return four_bit_level(table, plane, 8 * byte + quad % 2 * 4);
    } else {
      const Bytes plane = load(rows + quad * kPlaneBytes);
      const Ints moved = dwords(left_by(bytewise_less_128(plane), 24 - 8 * byte));
      return to_floats(right_signed(moved, 24));
    }
  }
};

template <Coding kCoding, int kTokens, int kRows>  // kRows registers of rows, from `from` on
void float_rows(const TileLayout& layout, const std::uint8_t* tile, int from, const float* values,
                const FloatActivations& x, std::int64_t token, float* out) {
  constexpr int kParts = kLanes == 16 ? 2 : 1;  // for any number of tokens: a token's rounding is its own
  constexpr bool kSigned = kCoding == Coding::kNormalFloat;
  const FloatDecoder<kCoding> decoder(layout);
  const std::uint8_t* at = tile + layout.steps_offset;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::uint8_t* header = tile + static_cast<std::int64_t>(group) * layout.scale_bytes;
    Floats scales[2][kRows];
    Floats sums[kTokens][kParts][kRows];
    BDK_UNROLL
    for (int v = 0; v < kRows; ++v) {
      const int row = (from + v) * kLanes;
      scales[0][v] = multiply(load_scales(layout, header, row), broadcast(layout.float_factor));
      scales[1][v] = kSigned ? load_scales(layout, header, kTileRows + row) : broadcast(0.0f);
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) BDK_UNROLL
      for (int part = 0; part < kParts; ++part) sums[t][part][v] = broadcast(0.0f);
    }
    for (std::int32_t step = layout.steps_of(group); step > 0; --step) {
      if (kTokens == 1) {
        for (std::int32_t line = 0; line < layout.step_bytes; line += 64) prefetch(at + kAheadBytes + line);
      }
      BDK_UNROLL
      for (int quad = 0; quad < FloatDecoder<kCoding>::kQuads; ++quad) BDK_UNROLL
      for (int byte = 0; byte < 4; ++byte) {
        Floats weights[kRows];
        BDK_UNROLL
        for (int v = 0; v < kRows; ++v) {
          weights[v] = decoder.level(at, quad, byte, from + v);
          if (kSigned) weights[v] = multiply(weights[v], signed_scale(weights[v], scales[0][v], scales[1][v]));
        }
        BDK_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const Floats one = broadcast(values[(4 * quad + byte) * kTokens + t]);
          BDK_UNROLL
          for (int v = 0; v < kRows; ++v)
            sums[t][quad % kParts][v] = multiply_add(weights[v], one, sums[t][quad % kParts][v]);
        }
      }
      at += layout.step_bytes;
      values += 4 * FloatDecoder<kCoding>::kQuads * kTokens;
    }
    BDK_UNROLL
    for (int v = 0; v < kRows; ++v) BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const int row = (from + v) * kLanes;
      Floats sum = sums[t][0][v];
      if (kParts == 2) sum = add(sum, sums[t][kParts - 1][v]);
      if (layout.zeros_offset) {
        const std::uint8_t* zeros = tile + layout.zeros_offset + static_cast<std::int64_t>(group) * kZeroBytes;
        const Floats zero = to_floats(nibbles(zeros + row % kZeroBytes, row / kZeroBytes));
        sum = multiply_add(subtract(broadcast(layout.float_center), zero),
                           broadcast(x.sums[(token + t) * x.groups + group]), sum);
      }
      float* total = out + (token + t) * kTileRows + row;
      store(total, kSigned ? add(load(total), sum) : multiply_add(scales[0][v], sum, load(total)));
    }
  }
}

template <Coding kCoding, int kTokens>
void float_block(const TileLayout& layout, const std::uint8_t* tile, const FloatActivations& x, std::int64_t token,
                 float* out) {
  constexpr int kRows = kTokens == 1 || kLanes == 16 ? kFloatVectors : 1;
  for (int from = 0; from < kFloatVectors; from += kRows)
    float_rows<kCoding, kTokens, kRows>(layout, tile, from, x.values + token * x.padded_columns, x, token, out);
}

using FloatBlock = void (*)(const TileLayout&, const std::uint8_t*, const FloatActivations&, std::int64_t, float*);

template <Coding kCoding, int... kTokensLessOne>
BDK_INLINE FloatBlock float_block_of(int tokens, std::integer_sequence<int, kTokensLessOne...>) {
  static constexpr FloatBlock kKernels[] = {float_block<kCoding, kTokensLessOne + 1>...};
  return kKernels[tokens - 1];
}

BDK_INLINE FloatBlock float_block_of(Coding coding, int tokens) {
  using Tokens = std::make_integer_sequence<int, kFloatTokens>;
  switch (coding) {
    case Coding::kTwoBit:
      return float_block_of<Coding::kTwoBit>(tokens, Tokens());
    case Coding::kThreeBit:
      return float_block_of<Coding::kThreeBit>(tokens, Tokens());
    case Coding::kNormalFloat:
      return float_block_of<Coding::kNormalFloat>(tokens, Tokens());
    case Coding::kFourBit:
      return float_block_of<Coding::kFourBit>(tokens, Tokens());
    default:
      return float_block_of<Coding::kEightBit>(tokens, Tokens());
  }
}

void float_tile(const TileLayout& layout, const std::uint8_t* tile, const FloatActivations& x, float* out) {
  std::memset(out, 0, static_cast<std::size_t>(x.tokens) * kTileRows * sizeof(float));
  for (std::int32_t block = 0; block < x.blocks(); ++block) {
    const std::int64_t token = x.first_token(block);
    float_block_of(layout.coding, static_cast<int>(x.first_token(block + 1) - token))(layout, tile, x, token, out);
  }
}
