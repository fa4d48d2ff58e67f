// How each coding's steps become bytes that a dot product takes; included by int8_tile.inl.
//
// A step has kQuads quads of four columns, and each gives kOutputs registers of bytes; they are summed up in
// kSums registers, the quad q of output o in sum(q, o), and total() makes the sum of an output of them.

template <int kTokens>
struct TwoBit {
  static constexpr bool kScaled = kScalesFields && kTokens <= 2;  // no shift: field f keeps its place, worth 4^f
  static constexpr bool kWide = kScaled, kAsks = true, kFar = false;
  static constexpr int kQuads = 4, kStepBytes = kPlaneBytes, kOutputs = 1, kSums = kScaled ? 4 : 1;
  BDK_INLINE explicit TwoBit(const TileLayout&) {}
  BDK_INLINE void decode(const std::uint8_t* step, int quad, int v, Bytes* codes) const {
    const Bytes low = load(step + v * kVectorBytes);
    codes[0] = kScaled ? only(low, 3 << (2 * quad)) : only(right(low, 2 * quad), 3);
  }
  static BDK_INLINE int sum(int quad, int) { return kScaled ? quad : 0; }
  static BDK_INLINE Ints total(const Ints (&sums)[kSums][kVectors], int, int v) {
    Ints all = sums[0][v];
    BDK_UNROLL
    for (int field = 1; field < kSums; ++field) all = add(all, right_signed(sums[field][v], 2 * field));
    return all;
  }
};

// What decoders without scaled sums have in common: several sums only so that one does not wait for the last.
template <int kOut, int kChains>
struct Chained {
  static constexpr int kOutputs = kOut, kSums = kOut * kChains;
  static BDK_INLINE int sum(int quad, int output) { return output * kChains + quad % kChains; }
  static BDK_INLINE Ints total(const Ints (&sums)[kSums][kVectors], int output, int v) {
    Ints all = sums[output * kChains][v];
    BDK_UNROLL
    for (int chain = 1; chain < kChains; ++chain) all = add(all, sums[output * kChains + chain][v]);
    return all;
  }
};

BDK_INLINE Bytes index_of(const std::uint8_t* step, int quad, int v) {
  const std::uint8_t* rows = step + v * kVectorBytes;
  return three_bit_index(load(rows + quad / 4 * kPlaneBytes), load(rows + 2 * kPlaneBytes), quad / 4, quad % 4);
}

template <int kTokens>
struct ThreeBit : Chained<1, kTokens == 1 && kLanes == 16 ? 2 : 1> {
  static constexpr bool kWide = false, kAsks = true, kFar = true;
  static constexpr int kQuads = 8, kStepBytes = 3 * kPlaneBytes;
  Levels levels;
  BDK_INLINE explicit ThreeBit(const TileLayout&) {
    const std::uint8_t codes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    levels = make_levels(codes);
  }
  BDK_INLINE void decode(const std::uint8_t* step, int quad, int v, Bytes* codes) const {
    const Bytes index = index_of(step, quad, v);
    codes[0] = kIndexIsCode ? index : look_up(levels, index, quad % 4);
  }
};

template <int kTokens>
struct NormalFloat : Chained<2, kTokens == 1 && kLanes == 16 ? 2 : 1> {
  static constexpr bool kWide = true, kAsks = true, kFar = true;
  static constexpr int kQuads = 8, kStepBytes = 3 * kPlaneBytes;
  Levels positive, negative;
  BDK_INLINE explicit NormalFloat(const TileLayout& layout)
      : positive(make_levels(layout.positive_levels)), negative(make_levels(layout.negative_levels)) {}
  BDK_INLINE void decode(const std::uint8_t* step, int quad, int v, Bytes* codes) const {
    const Bytes index = index_of(step, quad, v);
    codes[0] = look_up(positive, index, quad % 4);
    codes[1] = look_up(negative, index, quad % 4);
  }
};

template <int kTokens>
struct FourBit : Chained<1, kTokens == 1 && kLanes == 16 ? 2 : 1> {
  static constexpr bool kWide = false, kAsks = true, kFar = false;
  static constexpr int kQuads = 4, kStepBytes = 2 * kPlaneBytes;
  BDK_INLINE explicit FourBit(const TileLayout&) {}
  BDK_INLINE void decode(const std::uint8_t* step, int quad, int v, Bytes* codes) const {
    codes[0] = only(right(load(step + quad / 2 * kPlaneBytes + v * kVectorBytes), quad % 2 * 4), 15);
  }
};

template <int kTokens>
struct EightBit : Chained<1, kTokens == 1 && kLanes == 16 ? 2 : 1> {
  static constexpr bool kWide = true, kAsks = false, kFar = false;  // nothing holds up the reading
  static constexpr int kQuads = 4, kStepBytes = 4 * kPlaneBytes;
  BDK_INLINE explicit EightBit(const TileLayout&) {}
  BDK_INLINE void decode(const std::uint8_t* step, int quad, int v, Bytes* codes) const {
    codes[0] = load(step + quad * kPlaneBytes + v * kVectorBytes);
  }
};
