// The product of a tile with int8 activations, written once over a vector type of each instruction set.
//
// Included into the anonymous namespace of a unit that has defined (tile_avx512.inl is an example):
//   kLanes, Bytes, Ints, Floats     a register as 4 kLanes bytes, kLanes int32, kLanes floats; one lane is one row
//   load, store, only, right        of Bytes; `only` keeps the bits of a mask in every byte, `right` shifts dwords
//   dot<kWide>(sum, codes, four)    sum + the products of unsigned codes (up to 127, kWide: 255) and four activations
//   three_bit_index, look_up        see layout.h; kIndexIsCode where an index needs no lookup to be a code
//   kStreamTokens, kBlockTokens     tokens of a block that are multiplied while decoding, and the most of a block
//   kGemmVectors                    registers of rows that are multiplied at a time with a block
//
// A block of few tokens streams: codes are decoded, multiplied and forgotten, and what memory needs is asked for
// ahead of time.  More tokens share one decoding: a panel of columns is unpacked to one byte per code in the first
// cache, and then all blocks pass over it with their sums in registers.
//
// Codes stay unsigned; the zero point is taken off once per group with the sum of the activations.  Sums are exact
// integers, so only the order of the float operations in add_group() matters, and there is one.

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
// kOutput 0: affine codes; 1 and 2: the levels of nf3's two signs.
template <int kOutput>
struct Adder {
  Floats step;
  Ints zeros;

  BDK_INLINE Adder(const TileLayout& layout, const Group& group, int v) {
    const int row = v * kLanes;
    if constexpr (kOutput == 0) {
      step = multiply(load_scales(layout, group.scales, row), broadcast(layout.integer_factor));
      zeros = layout.zeros_offset ? nibbles(group.zeros + row % kZeroBytes, row / kZeroBytes)
                                  : broadcast(layout.fixed_zero);
    } else {
      const float factor = kOutput == 1 ? layout.positive_factor : layout.negative_factor;
      step = multiply(load_scales(layout, group.scales, (kOutput - 1) * kTileRows + row), broadcast(factor));
    }
  }

  BDK_INLINE void apply(const TileLayout& layout, Ints sum, std::int32_t x_sum, const float* x_scale,
                        float* out) const {
    Ints value = sum;
    if constexpr (kOutput == 0) value = subtract(left(sum, layout.code_shift), multiply(zeros, broadcast(x_sum)));
    const Floats scaled = x_scale == nullptr ? step : multiply(step, broadcast(*x_scale));
    const Floats product = multiply(scaled, to_floats(value));
    store(out, kOutput == 2 ? subtract(load(out), product) : add(load(out), product));
  }
};

#include "decoders.inl"

// Asks for the memory that a stream will need when kAheadBytes more have been read.  A tile is asked for in step with
// what is read of its codes, and its header in as many parts as it has groups: all at once would fill the queue.
class Ahead {
 public:
  BDK_INLINE Ahead(const TileLayout& layout, const std::uint8_t* tile)
      : at_(tile + kAheadBytes), header_bytes_(layout.steps_offset / layout.groups) {}

  BDK_INLINE void group() {
    BDK_NO_UNROLL_LOOP
    for (std::int32_t line = 0; line < header_bytes_; line += 64) prefetch(at_ + line);
    at_ += header_bytes_;
  }

  template <int kBytes>
  BDK_INLINE void step() {
    BDK_UNROLL
    for (int line = 0; line < kBytes; line += 64) prefetch(at_ + line);
    at_ += kBytes;
  }

 private:
  const std::uint8_t* at_;
  std::int32_t header_bytes_;
};

template <template <int> class Coder, int kTokens>
void stream(const TileLayout& layout, const std::uint8_t* tile, const Int8Activations& x, float* out) {
  using Decoder = Coder<kTokens>;
  const Decoder decoder(layout);
  const std::uint8_t* at = tile + layout.steps_offset;
  Ahead ahead(layout, tile);
  const std::int8_t* values = x.values;
  for (std::int32_t index = 0; index < layout.groups; ++index) {
    ahead.group();
    Ints sums[kTokens][Decoder::kSums][kVectors];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int s = 0; s < Decoder::kSums; ++s) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[t][s][v] = broadcast(0);
    for (std::int32_t step = layout.steps_of(index); step > 0; --step) {
      ahead.template step<Decoder::kStepBytes>();
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
      const Adder<Decoder::kOutput> first(layout, group, v);
      const Adder<2> second(layout, group, v);  // nf3's
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const std::int64_t place = t * static_cast<std::int64_t>(x.groups) + index;
        const float* x_scale = x.group_scales == nullptr ? nullptr : x.group_scales + place;
        float* to = out + t * kTileRows + v * kLanes;
        first.apply(layout, Decoder::total(sums[t], 0, v), x.sums[place], x_scale, to);
        if constexpr (Decoder::kOutputs == 2)
          second.apply(layout, Decoder::total(sums[t], 1, v), x.sums[place], x_scale, to);
      }
    }
  }
}

// One block of tokens over one panel.
struct Pass {
  const std::uint8_t* panel;
  std::int32_t quads;
  const std::int8_t* values;
  bool first, last;       // panel of the group: sums begin, and are added to the output
  std::int32_t* carried;  // sums between panels, [kTokens][32]
  Group group;
  const std::int32_t* x_sums;
  const float* x_scales;
  std::int32_t groups;
  float* out;
};

template <int kTokens, int kOutput, bool kWide>
void multiply_block(const TileLayout& layout, const Pass& pass) {
  BDK_NO_UNROLL_LOOP
  for (int from = 0; from < kVectors; from += kGemmVectors) {
    Ints sums[kTokens][kGemmVectors];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int v = 0; v < kGemmVectors; ++v)
      sums[t][v] = pass.first ? broadcast(0) : load(pass.carried + t * kTileRows + (from + v) * kLanes);
    const std::uint8_t* panel = pass.panel + from * kVectorBytes;
    const std::int8_t* values = pass.values;
    BDK_NO_UNROLL_LOOP
    for (std::int32_t quad = pass.quads; quad > 0; --quad) {
      Bytes codes[kGemmVectors];
      BDK_UNROLL
      for (int v = 0; v < kGemmVectors; ++v) codes[v] = load(panel + v * kVectorBytes);
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Bytes four = broadcast4(values + 4 * t);
        BDK_UNROLL
        for (int v = 0; v < kGemmVectors; ++v) sums[t][v] = dot<kWide>(sums[t][v], codes[v], four);
      }
      panel += kPlaneBytes;
      values += 4 * kTokens;
    }
    if (!pass.last) {
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) BDK_UNROLL
      for (int v = 0; v < kGemmVectors; ++v) store(pass.carried + t * kTileRows + (from + v) * kLanes, sums[t][v]);
      continue;
    }
    BDK_UNROLL
    for (int v = 0; v < kGemmVectors; ++v) {
      const Adder<kOutput> adder(layout, pass.group, from + v);
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t)
        adder.apply(layout, sums[t][v], pass.x_sums[t * static_cast<std::int64_t>(pass.groups)],
                    pass.x_scales == nullptr ? nullptr : pass.x_scales + t * static_cast<std::int64_t>(pass.groups),
                    pass.out + t * kTileRows + (from + v) * kLanes);
    }
  }
}

using Multiply = void (*)(const TileLayout&, const Pass&);

template <int kOutput, bool kWide, int... kTokensLessOne>
BDK_INLINE Multiply multiply_of(int tokens, std::integer_sequence<int, kTokensLessOne...>) {
  static constexpr Multiply kKernels[] = {multiply_block<kTokensLessOne + 1, kOutput, kWide>...};
  return kKernels[tokens - 1];
}

template <typename Decoder>
void unpack(const Decoder& decoder, const std::uint8_t* at, std::int32_t steps, Ahead* ahead, std::uint8_t* panel) {
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
  Ahead ahead(layout, tile);
  std::int64_t column = 0;  // padded
  for (std::int32_t index = 0; index < layout.groups; ++index) {
    const std::int32_t all = layout.steps_of(index);
    ahead.group();
    for (std::int32_t step = 0; step < all; step += kPanelSteps) {
      const std::int32_t steps = all - step < kPanelSteps ? all - step : kPanelSteps;
      unpack(decoder, at, steps, &ahead, panel);
      for (std::int32_t block = 0; block < x.blocks(); ++block) {
        const std::int64_t token = x.first_token(block);
        const int width = static_cast<int>(x.first_token(block + 1) - token);
        const std::int64_t place = token * x.groups + index;
        BDK_UNROLL
        for (int o = 0; o < Decoder::kOutputs; ++o) {
          const Pass pass = {panel + o * kPanelBytes,
                             steps * Decoder::kQuads,
                             x.values + token * x.padded_columns + column * width,
                             step == 0,
                             step + steps == all,
                             carried + (o * kMostTokens + token) * kTileRows,
                             group_of(layout, tile, index),
                             x.sums + place,
                             x.group_scales == nullptr ? nullptr : x.group_scales + place,
                             x.groups,
                             out + token * kTileRows};
          const Multiply multiply = o == 0 ? multiply_of<Decoder::kOutput, Decoder::kWide>(width, Tokens())
                                           : multiply_of<2, Decoder::kWide>(width, Tokens());
          multiply(layout, pass);
        }
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
  constexpr int kMost = kStreamTokens / Coder<1>::kOutputs > 0 ? kStreamTokens / Coder<1>::kOutputs : 1;
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
