// The tokens of one pass: pieces of several sequences, one after the other, without padding.
#pragma once

#include <cstdint>
#include <vector>

namespace bdk {

// `count` tokens of a sequence, at the rows `row` and on of the pass; its cache holds `start` tokens before them.
struct Piece {
  std::int64_t slot;
  std::int64_t start;
  std::int64_t count;
  std::int64_t row;
};

using Batch = std::vector<Piece>;

inline std::int64_t tokens_of(const Batch& batch) { return batch.empty() ? 0 : batch.back().row + batch.back().count; }

// Calls visit(piece, row of the pass, position in its sequence) for the rows from `begin` up to `end`.
template <typename Visit>
void for_rows(const Batch& batch, std::int64_t begin, std::int64_t end, Visit visit) {
  for (const Piece& piece : batch) {
    const std::int64_t first = piece.row > begin ? piece.row : begin;
    const std::int64_t last = piece.row + piece.count < end ? piece.row + piece.count : end;
    for (std::int64_t row = first; row < last; ++row) visit(piece, row, piece.start + row - piece.row);
  }
}

}  // namespace bdk
