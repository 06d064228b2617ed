"""Kernels that move KV pages between pools on a GPU.

Knows neither SGLang nor PrefillShare: pools are addresses and widths. Import the module that has the operation,
`copy_pages` or `staging`; this package itself loads neither torch nor triton.
"""
