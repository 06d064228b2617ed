"""Multi-agent workloads and what measures them: sessions and arrivals, topologies, driver, report, plots.

`session`, `presets`, `trace` and `arrivals` say what is asked and when (pure and seeded), `config` parses a benchmark's
file, `topologies` says which servers answer, `driver` asks them, `report` and `plot` tell what was found, and `bench`
is the whole of `prefillshare bench serving`. Importing this package imports none of them.
"""
