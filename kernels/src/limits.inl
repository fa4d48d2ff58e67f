// What an instruction set can do at best, measured by `bitdistill bench kernels`: reading memory, and int8 dot
// products. Included like int8_tile.inl.

// Sums up the memory's dwords from one end, with or without asking ahead, or from four places at once.
template <int kStreams, bool kAsks>
Ints read_streams(const std::uint8_t* memory, std::int64_t bytes) {
  constexpr int kStride = 256;
  const std::int64_t each = bytes / kStreams / kStride * kStride;
  const std::int32_t ahead = has_large_first_cache() ? kLargeCacheAheadBytes : kAheadBytes;
  Ints sums[4] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
  for (std::int64_t at = 0; at < each; at += kStride) {
    BDK_UNROLL
    for (int stream = 0; stream < kStreams; ++stream) {
      const std::uint8_t* from = memory + stream * each + at;
      if (kAsks) {
        for (int line = 0; line < kStride; line += 64) prefetch(from + ahead + line);
      }
      BDK_UNROLL
      for (int part = 0; part < kStride / kVectorBytes; ++part)
        sums[part % 4] = add(sums[part % 4], load(reinterpret_cast<const std::int32_t*>(from) + part * kLanes));
    }
  }
  return add(add(sums[0], sums[1]), add(sums[2], sums[3]));
}

std::uint64_t read(const std::uint8_t* memory, std::int64_t bytes, int way) {
  const Ints sum = way == 0   ? read_streams<1, false>(memory, bytes)
                   : way == 1 ? read_streams<1, true>(memory, bytes)
                              : read_streams<4, false>(memory, bytes);
  alignas(kAlignment) std::int32_t lanes[kLanes];
  store(lanes, sum);
  std::uint64_t all = 0;
  for (std::int32_t lane : lanes) all += static_cast<std::uint32_t>(lane);
  return all;
}

#if !defined(BDK_AMX)  // which has one of its own
std::int64_t multiply_add(std::int64_t rounds) {
  constexpr int kChains = kBlockTokens;
  const std::int8_t values[4] = {1, -1, 2, -2};
  const Bytes four = broadcast4(values), codes = only(four, 3);
  Ints sums[kChains];
  BDK_UNROLL
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = broadcast(chain);
  BDK_NO_UNROLL_LOOP
  for (std::int64_t round = 0; round < rounds; ++round) {
    BDK_UNROLL
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = dot<false>(sums[chain], codes, four);
      BDK_KEEP(sums[chain]);  // or the compiler would see that all rounds are alike
    }
  }
  alignas(kAlignment) volatile std::int32_t kept[kLanes];
  BDK_UNROLL
  for (int chain = 1; chain < kChains; ++chain) sums[0] = add(sums[0], sums[chain]);
  store(const_cast<std::int32_t*>(kept), sums[0]);
  return std::int64_t{2} * kChains * kLanes * 4;
}
#endif
