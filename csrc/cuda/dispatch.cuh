// From a run-time dtype code to a type: with_dtype(code, [&](auto tag) { using T = ...; }).
#pragma once

#include "launch.cuh"
#include "types.cuh"

namespace dsv4 {

template <class T> struct Tag {
    using type = T;
};
template <class T> using type_of = typename T::type;

template <class Body> inline int with_dtype(int dtype, Body body) {
    if (dtype == DSV4_F32) return body(Tag<float>{});
    if (dtype == DSV4_BF16) return body(Tag<bf16>{});
    return kUnsupported;
}

template <class Body> inline int with_any_dtype(int dtype, Body body) {
    return dtype == DSV4_F16 ? body(Tag<__half>{}) : with_dtype(dtype, body);
}

}  // namespace dsv4
