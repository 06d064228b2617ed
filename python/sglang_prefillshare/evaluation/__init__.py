"""How right decode modules are on public benchmarks, with the benchmarks' own scoring.

`bfcl` and `humaneval` own the questions and what counts as right, `sandbox` runs code that a model wrote, `tasks` makes
both alike, `answers` gets answers offline or through a deployment, and `report` is the whole of `prefillshare eval
tasks`. Importing this package imports none of them.
"""
