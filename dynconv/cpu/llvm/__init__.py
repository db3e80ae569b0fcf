"""Operations that Numba has no words for, as LLVM intrinsics: a module for each theme, whatever needs it imports it.

`build` has what LLVM IR is written with and imports none of the others; `elements`, `tiles`, `activations`, `stencils`,
`rows`, `filters`, `normalizations`, `sampling` and `digest` have what kernels call.
"""
