"""The router: it picks the workers of a request and joins its prefill leg and its decode leg (paper §3.3).

`config` says what it is told, `policy` and `prefix_index` decide (pure), `request` builds the legs' bodies (pure),
`workers` knows who may serve, `sessions` where a session was last, and `placement` chooses by all of these. `admission`
says whether a worker has room (pure), `holdings` what our legs hold there, `waiting` who is next (pure), `sharing`
whether to wait for a prefix (pure), and `gate` lets requests through. `client` is the client's end of a call. `legs`
runs the two legs of an `attempt`, `failures` is what can go wrong there, `aborts` tells workers of legs that are left.
`endings` says what follows from how they end (pure), `breaker` leaves out a worker that keeps failing (pure),
`dispatch` serves the whole call. `telemetry` counts calls, `worker_metrics` sums what workers count (pure),
`app` and `server` put it on a port.
"""
