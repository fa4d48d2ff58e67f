// The product of a tile with int8 activations, written once over a vector type of each instruction set.
//
// Included into the anonymous namespace of a unit that has defined (tile_avx512.inl is an example):
//   kLanes, Bytes, Ints, Floats     a register as 4 kLanes bytes, kLanes int32, kLanes floats; one lane is one row
//   load, store, only, right        of Bytes; `only` keeps the bits of a mask in every byte, `right` shifts dwords
//   dot<kWide>(sum, codes, four)    sum + the products of unsigned codes (up to 127, kWide: 255) and four activations
//   three_bit_index, look_up        see layout.h; kIndexIsCode where an index needs no lookup to be a code
//   kScalesFields                   where registers suffice for sums of codes that stay in their places
//   kStreamTokens, kBlockTokens     tokens of a block that are multiplied while decoding, and the most of a block
//   kGemmVectors                    registers of rows that are multiplied at a time with a block
//   kAheadBytes, kNearBytes, kFarBytes   how far ahead memory is asked for (see Ahead); no kFarBytes: by one distance
//
// A block of few tokens streams: codes are decoded, multiplied and forgotten, and what memory needs is asked for
// ahead of time.  More tokens share one decoding: a panel of columns is unpacked to one byte per code in the first
// cache, and then all blocks pass over it with their sums in registers.
//
// Codes stay unsigned; the zero point is taken off once per group with the sum of the activations.  Sums are exact
// integers, so only the order of an Adder's float operations matters, and there is one.

constexpr int kVectors = kTileRows / kLanes;
constexpr int kVectorBytes = 4 * kLanes;
constexpr int kPanelQuads = 64;  // four columns each: 8 KiB
constexpr int kPanelBytes = kPanelQuads * kPlaneBytes;
constexpr int kMostOutputs = 2;

// What belongs to a group of columns of the tile.
struct Group {
  const std::uint8_t* scales;
  const std::uint8_t* zeros;
  std::int32_t index;
};

BDK_INLINE Group group_of(const TileLayout& layout, const std::uint8_t* tile, std::int32_t index) {
  return {tile + static_cast<std::int64_t>(index) * layout.scale_bytes,
          tile + layout.zeros_offset + static_cast<std::int64_t>(index) * kZeroBytes, index};
}

// Adds the exact sums of a group to the output of one token, for the rows of one register.
template <int kOutputs>
class Adder;

template <>
class Adder<1> {  // affine codes
 public:
  BDK_INLINE Adder(const TileLayout& layout, const Group& group, int v) {
    const int row = v * kLanes;
    step_ = multiply(load_scales(layout, group.scales, row), broadcast(layout.integer_factor));
    zeros_ =
        layout.zeros_offset ? nibbles(group.zeros + row % kZeroBytes, row / kZeroBytes) : broadcast(layout.fixed_zero);
  }

  BDK_INLINE void apply(const TileLayout& layout, const Ints (&sums)[1], std::int32_t x_sum, const float* x_scale,
                        float* out) const {
    const Ints value = subtract(left(sums[0], layout.code_shift), multiply(zeros_, broadcast(x_sum)));
    const Floats step = x_scale == nullptr ? step_ : multiply(step_, broadcast(*x_scale));
    store(out, add(load(out), multiply(step, to_floats(value))));
  }

 private:
  Floats step_;
  Ints zeros_;
};

template <>
class Adder<2> {  // nf3's two signs
 public:
  BDK_INLINE Adder(const TileLayout& layout, const Group& group, int v) {
    const int row = v * kLanes;
    positive_ = multiply(load_scales(layout, group.scales, row), broadcast(layout.positive_factor));
    negative_ = multiply(load_scales(layout, group.scales, kTileRows + row), broadcast(layout.negative_factor));
  }

  BDK_INLINE void apply(const TileLayout&, const Ints (&sums)[2], std::int32_t, const float* x_scale,
                        float* out) const {
    Floats positive = positive_, negative = negative_;
    if (x_scale != nullptr) {
      positive = multiply(positive, broadcast(*x_scale));
      negative = multiply(negative, broadcast(*x_scale));
    }
    const Floats more = add(load(out), multiply(positive, to_floats(sums[0])));
    store(out, subtract(more, multiply(negative, to_floats(sums[1]))));
  }

 private:
  Floats positive_, negative_;
};

#include "decoders.inl"

// Asks for the memory that a stream will need when some more of its codes have been read.  A tile is asked for in step
// with what is read of its codes, and its header in as many parts as it has groups: all at once would fill the queue.
// A large first cache is asked kLargeCacheAheadBytes ahead.  With a smaller one, what decodes slower than memory is
// read (kFar) is brought to the second cache long before, and to the first from there: the few requests that the first
// cache has open would otherwise wait for memory and for the decoding in turn.
template <bool kFar>
class Ahead {
 public:
  BDK_INLINE Ahead(const TileLayout& layout, const std::uint8_t* tile)
      : at_(tile + layout.steps_offset),
        header_bytes_(layout.steps_offset / layout.groups),
        near_(has_large_first_cache() ? kLargeCacheAheadBytes
              : kFar                  ? kNearBytes
                                      : kAheadBytes),
        far_(kFar && !has_large_first_cache() ? kFarBytes : 0) {}

  BDK_INLINE void group() {
    BDK_NO_UNROLL_LOOP
    for (std::int32_t line = 0; line < header_bytes_; line += 64) ask(at_ + line);
    at_ += header_bytes_;
  }

  template <int kBytes>
  BDK_INLINE void step() {
    BDK_UNROLL
    for (int line = 0; line < kBytes; line += 64) ask(at_ + line);
    at_ += kBytes;
  }

 private:
  BDK_INLINE void ask(const std::uint8_t* at) const {
    if (kFar && far_ != 0) prefetch_far(at + far_);
    prefetch(at + near_);
  }

  const std::uint8_t* at_;
  std::int32_t header_bytes_, near_, far_;
};

template <template <int> class Coder, int kTokens>
void stream(const TileLayout& layout, const std::uint8_t* tile, const Int8Activations& x, float* out) {
  using Decoder = Coder<kTokens>;
  const Decoder decoder(layout);
  const std::uint8_t* at = tile + layout.steps_offset;
  Ahead<Decoder::kFar && kFarBytes != 0> ahead(layout, tile);
  const std::int8_t* values = x.values;
  for (std::int32_t index = 0; index < layout.groups; ++index) {
    ahead.group();
    Ints sums[kTokens][Decoder::kSums][kVectors];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int s = 0; s < Decoder::kSums; ++s) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[t][s][v] = broadcast(0);
    for (std::int32_t step = layout.steps_of(index); step > 0; --step) {
      if (Decoder::kAsks) ahead.template step<Decoder::kStepBytes>();
      BDK_UNROLL
      for (int quad = 0; quad < Decoder::kQuads; ++quad) {
        Bytes codes[kVectors][kMostOutputs];
        BDK_UNROLL
        for (int v = 0; v < kVectors; ++v) decoder.decode(at, quad, v, codes[v]);
        BDK_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const Bytes four = broadcast4(values + 4 * (quad * kTokens + t));
          BDK_UNROLL
          for (int o = 0; o < Decoder::kOutputs; ++o) BDK_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            Ints& sum = sums[t][Decoder::sum(quad, o)][v];
            sum = dot<Decoder::kWide>(sum, codes[v][o], four);
          }
        }
      }
      at += Decoder::kStepBytes;
      values += 4 * Decoder::kQuads * kTokens;
    }
    const Group group = group_of(layout, tile, index);
    BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Adder<Decoder::kOutputs> adder(layout, group, v);
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const std::int64_t place = t * static_cast<std::int64_t>(x.groups) + index;
        Ints totals[Decoder::kOutputs];
        BDK_UNROLL
        for (int o = 0; o < Decoder::kOutputs; ++o) totals[o] = Decoder::total(sums[t], o, v);
        adder.apply(layout, totals, x.sums[place], x.group_scales == nullptr ? nullptr : x.group_scales + place,
                    out + t * kTileRows + v * kLanes);
      }
    }
  }
}

// One block of tokens over one panel.
struct Pass {
  const std::uint8_t* panel;  // kPanelBytes for each output
  std::int32_t quads;
  const std::int8_t* values;
  bool first, last;       // panel of the group: sums begin, and are added to the output
  std::int32_t* carried;  // sums between panels: [tokens][outputs][32]
  Group group;
  const std::int32_t* x_sums;
  const float* x_scales;
  std::int32_t groups;
  float* out;
};

// Tokens [from, from + kTokens) of a block of kWidth.
template <int kWidth, int kTokens, int kOutputs, bool kWide>
BDK_INLINE void multiply_tokens(const TileLayout& layout, const Pass& pass, int from) {
  BDK_NO_UNROLL_LOOP
  for (int rows = 0; rows < kVectors; rows += kGemmVectors) {
    Ints sums[kTokens][kOutputs][kGemmVectors];
    std::int32_t* carried = pass.carried + from * kOutputs * kTileRows + rows * kLanes;
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int o = 0; o < kOutputs; ++o) BDK_UNROLL
    for (int v = 0; v < kGemmVectors; ++v)
      sums[t][o][v] = pass.first ? broadcast(0) : load(carried + (t * kOutputs + o) * kTileRows + v * kLanes);
    const std::uint8_t* panel = pass.panel + rows * kVectorBytes;
    const std::int8_t* values = pass.values + 4 * from;
    BDK_NO_UNROLL_LOOP
    for (std::int32_t quad = pass.quads; quad > 0; --quad) {
      Bytes codes[kOutputs][kGemmVectors];
      BDK_UNROLL
      for (int o = 0; o < kOutputs; ++o) BDK_UNROLL
      for (int v = 0; v < kGemmVectors; ++v) codes[o][v] = load(panel + o * kPanelBytes + v * kVectorBytes);
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Bytes four = broadcast4(values + 4 * t);
        BDK_UNROLL
        for (int o = 0; o < kOutputs; ++o) BDK_UNROLL
        for (int v = 0; v < kGemmVectors; ++v) sums[t][o][v] = dot<kWide>(sums[t][o][v], codes[o][v], four);
      }
      panel += kPlaneBytes;
      values += 4 * kWidth;
    }
    if (!pass.last) {
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) BDK_UNROLL
      for (int o = 0; o < kOutputs; ++o) BDK_UNROLL
      for (int v = 0; v < kGemmVectors; ++v)
        store(carried + (t * kOutputs + o) * kTileRows + v * kLanes, sums[t][o][v]);
      continue;
    }
    BDK_UNROLL
    for (int v = 0; v < kGemmVectors; ++v) {
      const Adder<kOutputs> adder(layout, pass.group, rows + v);
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const std::int64_t place = (from + t) * static_cast<std::int64_t>(pass.groups);
        Ints totals[kOutputs];
        BDK_UNROLL
        for (int o = 0; o < kOutputs; ++o) totals[o] = sums[t][o][v];
        adder.apply(layout, totals, pass.x_sums[place], pass.x_scales == nullptr ? nullptr : pass.x_scales + place,
                    pass.out + (from + t) * kTileRows + (rows + v) * kLanes);
      }
    }
  }
}

template <int kWidth, int kOutputs, bool kWide>
void multiply_block(const TileLayout& layout, const Pass& pass) {
  constexpr int kFirst = (kWidth + kOutputs - 1) / kOutputs;  // tokens whose sums fit into the registers
  multiply_tokens<kWidth, kFirst, kOutputs, kWide>(layout, pass, 0);
  if constexpr (kWidth > kFirst) multiply_tokens<kWidth, kWidth - kFirst, kOutputs, kWide>(layout, pass, kFirst);
}

using Multiply = void (*)(const TileLayout&, const Pass&);

template <int kOutputs, bool kWide, int... kTokensLessOne>
BDK_INLINE Multiply multiply_of(int tokens, std::integer_sequence<int, kTokensLessOne...>) {
  static constexpr Multiply kKernels[] = {multiply_block<kTokensLessOne + 1, kOutputs, kWide>...};
  return kKernels[tokens - 1];
}

#if defined(BDK_AMX)
#include "amx.inl"
#endif

template <typename Decoder>
void unpack(const Decoder& decoder, const std::uint8_t* at, std::int32_t steps, Ahead<false>* ahead,
            std::uint8_t* panel) {
  for (; steps > 0; --steps) {
    ahead->template step<Decoder::kStepBytes>();
    BDK_UNROLL
    for (int quad = 0; quad < Decoder::kQuads; ++quad) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Bytes codes[kMostOutputs];
      decoder.decode(at, quad, v, codes);
      BDK_UNROLL
      for (int o = 0; o < Decoder::kOutputs; ++o)
        store(panel + o * kPanelBytes + quad * kPlaneBytes + v * kVectorBytes, codes[o]);
    }
    at += Decoder::kStepBytes;
    panel += Decoder::kQuads * kPlaneBytes;
  }
}

template <template <int> class Coder>
void panels(const TileLayout& layout, const std::uint8_t* tile, const Int8Activations& x, float* out) {
  using Decoder = Coder<kBlockTokens>;
  using Tokens = std::make_integer_sequence<int, kBlockTokens>;
  constexpr int kPanelSteps = kPanelQuads / Decoder::kQuads;
  alignas(kAlignment) std::uint8_t panel[Decoder::kOutputs * kPanelBytes];
  alignas(kAlignment) std::int32_t carried[Decoder::kOutputs * kMostTokens * kTileRows];
  const Decoder decoder(layout);
  const std::uint8_t* at = tile + layout.steps_offset;
  Ahead<false> ahead(layout, tile);
  std::int64_t column = 0;  // padded
  for (std::int32_t index = 0; index < layout.groups; ++index) {
    const std::int32_t all = layout.steps_of(index);
    ahead.group();
    for (std::int32_t step = 0; step < all; step += kPanelSteps) {
      const std::int32_t steps = all - step < kPanelSteps ? all - step : kPanelSteps;
      unpack(decoder, at, steps, &ahead, panel);
      const auto pass_of = [&](std::int64_t token, int width) {
        const std::int64_t place = token * x.groups + index;
        return Pass{panel,
                    steps * Decoder::kQuads,
                    x.values + token * x.padded_columns + column * width,
                    step == 0,
                    step + steps == all,
                    carried + token * Decoder::kOutputs * kTileRows,
                    group_of(layout, tile, index),
                    x.sums + place,
                    x.group_scales == nullptr ? nullptr : x.group_scales + place,
                    x.groups,
                    out + token * kTileRows};
      };
#if defined(BDK_AMX)
      if (x.pitch != 0) {
        fill_up<Decoder>(steps, panel);
        multiply_by_matrices<Decoder::kOutputs>(layout, pass_of(0, 1), x.tokens, x.pitch);
      } else
#endif
        for (std::int32_t block = 0; block < x.blocks(); ++block) {
          const std::int64_t token = x.first_token(block);
          const int width = static_cast<int>(x.first_token(block + 1) - token);
          multiply_of<Decoder::kOutputs, Decoder::kWide>(width, Tokens())(layout, pass_of(token, width));
        }
      at += static_cast<std::int64_t>(steps) * Decoder::kStepBytes;
      column += static_cast<std::int64_t>(steps) * layout.step_columns;
    }
  }
}

using Stream = void (*)(const TileLayout&, const std::uint8_t*, const Int8Activations&, float*);

template <template <int> class Coder, int... kTokensLessOne>
BDK_INLINE Stream stream_of(int tokens, std::integer_sequence<int, kTokensLessOne...>) {
  static constexpr Stream kKernels[] = {stream<Coder, kTokensLessOne + 1>...};
  return kKernels[tokens - 1];
}

template <template <int> class Coder>
void multiply_tile(const TileLayout& layout, const std::uint8_t* tile, const Int8Activations& x, float* out) {
  constexpr int kMost = Coder<1>::kOutputs == 1 ? kStreamTokens : (kStreamTokens + 2) / 3;  // two sums, and tables
  if (x.tokens > kMost) return panels<Coder>(layout, tile, x, out);
  stream_of<Coder>(x.tokens, std::make_integer_sequence<int, kMost>())(layout, tile, x, out);
}

void int8_tile(const TileLayout& layout, const std::uint8_t* tile, const Int8Activations& x, float* out) {
  std::memset(out, 0, static_cast<std::size_t>(x.tokens) * kTileRows * sizeof(float));
  switch (layout.coding) {
    case Coding::kTwoBit:
      return multiply_tile<TwoBit>(layout, tile, x, out);
    case Coding::kThreeBit:
      return multiply_tile<ThreeBit>(layout, tile, x, out);
    case Coding::kNormalFloat:
      return multiply_tile<NormalFloat>(layout, tile, x, out);
    case Coding::kFourBit:
      return multiply_tile<FourBit>(layout, tile, x, out);
    case Coding::kEightBit:
      return multiply_tile<EightBit>(layout, tile, x, out);
  }
}
