"""The router: it picks the workers of a request and joins its prefill leg and its decode leg (paper §3.3).

`config` says what it is told, `policy` and `prefix_index` decide (pure), `request` builds the legs' bodies (pure),
`workers` knows who may serve, `sessions` where a session was last, `dispatch` runs the legs, `telemetry` counts them,
`worker_metrics` sums what the workers count (pure), `app` and `server` put it on a port.
"""
