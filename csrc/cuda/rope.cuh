// The angle of a rotary embedding.
#pragma once

#include <stdint.h>

namespace dsv4 {

// cos and sin of position * freq. The product is rounded to float32, as the reference does; the
// whole turns are taken off in float64, so that large angles keep every bit.
__device__ inline float2 turn(int64_t position, float freq, bool inverse) {
    double turns = (double)((float)position * freq) * 0.15915494309189533577;
    float2 cos_sin;
    sincospif(2 * (float)(turns - rint(turns)), &cos_sin.y, &cos_sin.x);
    if (inverse) cos_sin.y = -cos_sin.y;
    return cos_sin;
}

// A pair, turned. Written out, because what nvcc contracts differs between kernels that must round alike.
__device__ inline float2 turned_pair(float even, float odd, float2 cos_sin) {
    return {__fmaf_rn(even, cos_sin.x, -__fmul_rn(odd, cos_sin.y)),
            __fmaf_rn(even, cos_sin.y, __fmul_rn(odd, cos_sin.x))};
}

}  // namespace dsv4
