"""Sources of the compiled kernels, shipped as data; `engine.build` compiles them."""
