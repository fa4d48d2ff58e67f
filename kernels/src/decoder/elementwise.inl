// Norms, rotations, gates: what runs over one token's numbers.
#pragma once

#include "vector_math.inl"
#include "vector_ops.h"

namespace bdk {
namespace {

void rms_norm(const float* x, const float* gain, std::int64_t size, float eps, float* out) {
  Vec squares = zero();
  for_vectors(size, [&](std::int64_t at, int count) {
    const Vec some = load(x + at, count);
    squares = fma(some, some, squares);
  });
  const float mean = sum(squares) / static_cast<float>(size);
  const Vec factor = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for_vectors(size, [&](std::int64_t at, int count) {
    store(out + at, mul(mul(load(x + at, count), factor), load(gain + at, count)), count);
  });
}

void add_to(float* to, const float* x, std::int64_t size) {
  for_vectors(
      size, [&](std::int64_t at, int count) { store(to + at, add(load(to + at, count), load(x + at, count)), count); });
}

void apply_gate(bdk_activation activation, float* gate, const float* up, std::int64_t size) {
  for_vectors(size, [&](std::int64_t at, int count) {
    const Vec given = load(gate + at, count);
    const Vec opened = activation == BDK_GELU_TANH ? gelu(given) : silu(given);
    store(gate + at, mul(opened, load(up + at, count)), count);
  });
}

void rotate(float* head, const float* cosine, const float* sine, std::int64_t half) {
  for_vectors(half, [&](std::int64_t at, int count) {
    const Vec first = load(head + at, count), second = load(head + half + at, count);
    const Vec c = load(cosine + at, count), s = load(sine + at, count);
    store(head + at, sub(mul(first, c), mul(second, s)), count);
    store(head + half + at, add(mul(second, c), mul(first, s)), count);
  });
}

void soft_cap(float* x, std::int64_t size, float cap) {
  for_vectors(size, [&](std::int64_t at, int count) {
    const Vec scaled = div(load(x + at, count), broadcast(cap));
    store(x + at, mul(hyperbolic_tangent(scaled), broadcast(cap)), count);
  });
}

}  // namespace
}  // namespace bdk
