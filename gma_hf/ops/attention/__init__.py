# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Gaussian mixture attention. Tokens write values to the components of a mixture, queries read them back:

    S_t = a_t S_{t-1} + w_t gamma(k_t) v_t^T
    z_t = a_t z_{t-1} + w_t gamma(k_t)
    o_t = gamma(q_t) S_t / (gamma(q_t) z_t + eps)        or gamma(q_t) S_t, un-normalised

`functional` is the public door, `call` what passes it, `validation` its checks, `mixture` gamma. The ways, listed in `ways`:
`reference` (the definition), `minimal` (the chunked pass, to be read), `chunked` (the same with gradients and care for digits),
`recurrent` (token by token, and one decoding step), `fused` (the kernels in `triton`).
"""
