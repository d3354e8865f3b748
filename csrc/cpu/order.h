// The k best of a list of floats in a fixed order: NaN first, then from large to small, and equal
// values (0 and -0 too) by the lower index. This is torch's stable descending sort.
#pragma once

#include <algorithm>
#include <functional>

#include "vec.h"

namespace dsv4 {

// Larger for what comes earlier: the value's order in the high half, the index's in the low half.
inline uint64_t order_key(float value, uint32_t index) {
    uint32_t bits = bits_as<uint32_t>(value + 0.0f);  // turns -0 into 0
    uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if (value != value) order = 0xffffffffu;
    return uint64_t(order) << 32 | ~index;
}

// index[0 ... k) of the best of `count` values; `keys` is room for `count` keys.
inline void best_first(const float* values, int64_t count, int64_t k, uint64_t* keys,
                       int32_t* index) {
    for (int64_t i = 0; i < count; i++) keys[i] = order_key(values[i], uint32_t(i));
    if (k < count) std::nth_element(keys, keys + k, keys + count, std::greater<>());
    std::sort(keys, keys + k, std::greater<>());
    for (int64_t i = 0; i < k; i++) index[i] = int32_t(~uint32_t(keys[i]));
}

}  // namespace dsv4
