// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and Cringe's draw from it: bit
// for bit fastd2o/ops/philox.py and docs/engine.md, "The draw, exactly".
#pragma once

#include <cmath>
#include <cstdint>

#include "online_softmax.h"
#include "portable.h"

namespace fastd2o {

struct PhiloxWords {
  uint32_t x, y, z, w;
};

// Four random words at a 64-bit counter (the upper half of Philox' 128 bits is 0) under a 64-bit key.
FASTD2O_HD PhiloxWords philox_4x32(uint64_t seed, uint64_t counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  PhiloxWords c{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c.x, second = uint64_t{0xCD9E8D57u} * c.z;
    c = {static_cast<uint32_t>(second >> 32) ^ c.y ^ key0, static_cast<uint32_t>(second),
         static_cast<uint32_t>(first >> 32) ^ c.w ^ key1, static_cast<uint32_t>(first)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// A multiple of 2^-24 in [0, 1).
FASTD2O_HD float philox_uniform(uint64_t seed, uint64_t counter) {
  return static_cast<float>(philox_4x32(seed, counter).x >> 8) * 0x1p-24f;
}

// How many of k candidates come before candidate i: the larger logits and, of equal ones, the smaller columns.
FASTD2O_HD int candidate_rank(const float* values, const int64_t* index, int k, int i) {
  const uint64_t mine = rank_key(values[i], static_cast<uint32_t>(index[i]));
  int rank = 0;
  for (int j = 0; j < k; ++j) {
    const uint64_t other = rank_key(values[j], static_cast<uint32_t>(index[j]));
    rank += other > mine || (other == mine && j < i);
  }
  return rank;
}

// Which of k logits, in descending order, the number u in [0, 1) draws from their softmax; -1 if all are -inf.
FASTD2O_HD int drawn_candidate(const float* ordered, int k, float u) {
  float total = 0.0f;
  int finite = 0;
  for (; finite < k && ordered[finite] != -INFINITY; ++finite) total += expf(ordered[finite] - ordered[0]);
  float below = 0.0f;
  for (int i = 0; i < finite - 1; ++i) {
    below += expf(ordered[i] - ordered[0]) / total;
    if (!(below <= u)) return i;  // NaN stops at once: it comes first, and must be seen
  }
  return finite - 1;
}

}  // namespace fastd2o
