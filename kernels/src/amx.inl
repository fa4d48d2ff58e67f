// Many tokens by AMX: a tile register holds 16 tokens or 16 quads, and one instruction multiplies 16 tokens by 16 rows
// over 64 columns.  Included by int8_tile.inl where BDK_AMX is defined.
//
// The panel of unpacked codes is what the instruction wants of its second operand: a line of 64 bytes is four columns
// of 16 rows.  Its first are the activations, a token after the other, so from kMatrixTokens on they are staged that
// way.  Sums are exact integers and belong to a group of columns, as everywhere; they wait in memory between panels.
// Two blocks of tokens, or one with two outputs, keep four sums under way, which hides what one instruction takes.
//
// With BDK_EMULATE_AMX the instructions are loops, so that any machine can test all that is around them.

constexpr int kMatrixTokens = 16;  // fewer are multiplied by vectors
constexpr int kMatrixQuads = 16;
static_assert(kPanelQuads % kMatrixQuads == 0, "a panel is filled up with zeros to whole matrices");

struct MatrixShapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(MatrixShapes) == 64, "as the processor reads it");

#if defined(BDK_EMULATE_AMX)
struct Matrix {
  std::uint8_t lines[16][64];
};
thread_local Matrix emulated[8];
thread_local MatrixShapes shapes_now;

inline void matrix_shapes(const MatrixShapes* shapes) {
  shapes_now = *shapes;
  std::memset(emulated, 0, sizeof emulated);
}
inline void matrix_end() { shapes_now = MatrixShapes(); }
inline void matrix_zero(int to) { std::memset(&emulated[to], 0, sizeof emulated[to]); }
inline void matrix_load(int to, const void* from, std::int64_t stride) {
  matrix_zero(to);
  for (int line = 0; line < shapes_now.rows[to]; ++line)
    std::memcpy(emulated[to].lines[line], static_cast<const std::uint8_t*>(from) + line * stride,
                shapes_now.row_bytes[to]);
}
inline void matrix_store(int from, void* to, std::int64_t stride) {
  for (int line = 0; line < shapes_now.rows[from]; ++line)
    std::memcpy(static_cast<std::uint8_t*>(to) + line * stride, emulated[from].lines[line], shapes_now.row_bytes[from]);
}
inline void matrix_dot(int sums, int tokens, int codes) {
  for (int token = 0; token < shapes_now.rows[sums]; ++token) {
    std::int32_t line[16];
    std::memcpy(line, emulated[sums].lines[token], sizeof line);
    for (int quad = 0; quad < shapes_now.rows[codes]; ++quad)
      for (int row = 0; row < 16; ++row)
        for (int byte = 0; byte < 4; ++byte)
          line[row] += static_cast<std::int8_t>(emulated[tokens].lines[token][4 * quad + byte]) *
                       emulated[codes].lines[quad][4 * row + byte];
    std::memcpy(emulated[sums].lines[token], line, sizeof line);
  }
}
#else  // macros, for the numbers of registers are part of the instructions
#define matrix_shapes(shapes) _tile_loadconfig(shapes)
#define matrix_end() _tile_release()
#define matrix_zero(to) _tile_zero(to)
#define matrix_load(to, from, stride) _tile_loadd(to, from, stride)
#define matrix_store(from, to, stride) _tile_stored(from, to, stride)
#define matrix_dot(sums, tokens, codes) _tile_dpbsud(sums, tokens, codes)
#endif

// Registers 0 to 3 hold sums, 4 and 5 activations of `tokens` tokens, 6 and 7 codes.
BDK_INLINE void shape_matrices(int tokens) {
  MatrixShapes shapes;
  for (int matrix = 0; matrix < 8; ++matrix) {
    shapes.row_bytes[matrix] = 64;
    shapes.rows[matrix] = static_cast<std::uint8_t>(matrix < 6 ? tokens : kMatrixQuads);
  }
  BDK_STORED(&shapes);
  matrix_shapes(&shapes);
}

// One or (kPair) two blocks of tokens over a panel, both halves of its rows.
template <bool kPair>
BDK_INLINE void matrix_sums(const Pass& pass, const std::int8_t* values, std::int64_t stride, std::int32_t* carried) {
  constexpr std::int64_t kLine = kTileRows * sizeof(std::int32_t);
  std::int32_t* second = carried + kMatrixTokens * kTileRows;
  if (pass.first) {
    matrix_zero(0);
    matrix_zero(1);
    if (kPair) matrix_zero(2);
    if (kPair) matrix_zero(3);
  } else {
    matrix_load(0, carried, kLine);
    matrix_load(1, carried + kLanes, kLine);
    if (kPair) matrix_load(2, second, kLine);
    if (kPair) matrix_load(3, second + kLanes, kLine);
  }
  for (std::int32_t quad = 0; quad < pass.quads; quad += kMatrixQuads) {
    const std::uint8_t* codes = pass.panel + quad * kPlaneBytes;
    matrix_load(6, codes, kPlaneBytes);
    matrix_load(7, codes + kVectorBytes, kPlaneBytes);
    matrix_load(4, values + 4 * quad, stride);
    matrix_dot(0, 4, 6);
    matrix_dot(1, 4, 7);
    if (kPair) {
      matrix_load(5, values + kMatrixTokens * stride + 4 * quad, stride);
      matrix_dot(2, 5, 6);
      matrix_dot(3, 5, 7);
    }
  }
  matrix_store(0, carried, kLine);
  matrix_store(1, carried + kLanes, kLine);
  if (kPair) matrix_store(2, second, kLine);
  if (kPair) matrix_store(3, second + kLanes, kLine);
}

// One block of tokens over the panels of two outputs.
BDK_INLINE void matrix_sums_of_two(const Pass& pass, const std::int8_t* values, std::int64_t stride,
                                   std::int32_t* carried) {
  constexpr std::int64_t kLine = 2 * kTileRows * sizeof(std::int32_t);
  std::int32_t* second = carried + kTileRows;
  if (pass.first) {
    matrix_zero(0);
    matrix_zero(1);
    matrix_zero(2);
    matrix_zero(3);
  } else {
    matrix_load(0, carried, kLine);
    matrix_load(1, carried + kLanes, kLine);
    matrix_load(2, second, kLine);
    matrix_load(3, second + kLanes, kLine);
  }
  for (std::int32_t quad = 0; quad < pass.quads; quad += kMatrixQuads) {
    const std::uint8_t* codes = pass.panel + quad * kPlaneBytes;
    matrix_load(4, values + 4 * quad, stride);
    matrix_load(6, codes, kPlaneBytes);
    matrix_load(7, codes + kVectorBytes, kPlaneBytes);
    matrix_dot(0, 4, 6);
    matrix_dot(1, 4, 7);
    matrix_load(6, codes + kPanelBytes, kPlaneBytes);
    matrix_load(7, codes + kPanelBytes + kVectorBytes, kPlaneBytes);
    matrix_dot(2, 4, 6);
    matrix_dot(3, 4, 7);
  }
  matrix_store(0, carried, kLine);
  matrix_store(1, carried + kLanes, kLine);
  matrix_store(2, second, kLine);
  matrix_store(3, second + kLanes, kLine);
}

// Zeros behind the last quad of a panel, to the end of its last matrix.
template <typename Decoder>
BDK_INLINE void fill_up(std::int32_t steps, std::uint8_t* panel) {
  const std::int32_t over = steps * Decoder::kQuads % kMatrixQuads;
  if (over == 0) return;
  const std::size_t bytes = static_cast<std::size_t>(kMatrixQuads - over) * kPlaneBytes;
  for (int o = 0; o < Decoder::kOutputs; ++o)
    std::memset(panel + o * kPanelBytes + steps * Decoder::kQuads * kPlaneBytes, 0, bytes);
}

// All `tokens` over one panel; `stride` bytes lie between the activations of two tokens.
template <int kOutputs>
void multiply_by_matrices(const TileLayout& layout, const Pass& pass, std::int32_t tokens, std::int64_t stride) {
  std::int32_t token = 0;
  const auto block = [&](int size) {
    std::int32_t* carried = pass.carried + static_cast<std::int64_t>(token) * kOutputs * kTileRows;
    const std::int8_t* values = pass.values + token * stride;
    if constexpr (kOutputs == 2) {
      matrix_sums_of_two(pass, values, stride, carried);
    } else if (size > kMatrixTokens) {
      matrix_sums<true>(pass, values, stride, carried);
    } else {
      matrix_sums<false>(pass, values, stride, carried);
    }
    token += size;
  };
  BDK_STORED(pass.panel);
  shape_matrices(kMatrixTokens);
  while (kOutputs == 1 && token + 2 * kMatrixTokens <= tokens) block(2 * kMatrixTokens);
  while (token + kMatrixTokens <= tokens) block(kMatrixTokens);
  if (token < tokens) {
    shape_matrices(tokens - token);
    block(tokens - token);
  }
  matrix_end();
  if (!pass.last) return;
  BDK_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Adder<kOutputs> adder(layout, pass.group, v);
    for (token = 0; token < tokens; ++token) {
      const std::int64_t place = token * static_cast<std::int64_t>(pass.groups);
      Ints totals[kOutputs];
      BDK_UNROLL
      for (int o = 0; o < kOutputs; ++o)
        totals[o] = load(pass.carried + (token * kOutputs + o) * kTileRows + v * kLanes);
      adder.apply(layout, totals, pass.x_sums[place], pass.x_scales == nullptr ? nullptr : pass.x_scales + place,
                  pass.out + token * kTileRows + v * kLanes);
    }
  }
}

// What `multiply_add` is for: `rounds` times as many multiplications and additions as are returned.
std::int64_t multiply_add_matrices(std::int64_t rounds) {
  shape_matrices(kMatrixTokens);
  matrix_zero(0);
  matrix_zero(1);
  matrix_zero(2);
  matrix_zero(3);
  matrix_zero(4);
  matrix_zero(6);
  BDK_NO_UNROLL_LOOP
  for (std::int64_t round = 0; round < rounds; ++round) {
    matrix_dot(0, 4, 6);
    matrix_dot(1, 4, 6);
    matrix_dot(2, 4, 6);
    matrix_dot(3, 4, 6);
  }
  matrix_end();
  return std::int64_t{2} * 4 * kMatrixTokens * kLanes * 4 * kMatrixQuads;
}
