"""Where the time of a layer goes: what `dsv4-bench profile` does, one step a module

`capturing` catches ops in a real forward pass, `ceilings` measures what the machine can do, `sites`
times every op on what was caught, `document` makes one result of it and compares two. `kernels`
names what ran inside an op; `nsys` and `ncu` ask NVIDIA's profilers; `trace` and `plots` are
renderings.
"""
