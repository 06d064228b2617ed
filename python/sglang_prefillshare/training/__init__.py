"""Cache-conditioned fine-tuning (paper §3.2): makes decode modules that generate from the base's KV.

`recipe` says what to train, `data` turns records into token ids, `loss` is eq. 7, `trainer` fits it into Transformers'
Trainer, and `run` is the whole of `prefillshare train`. Importing this package imports none of them.
"""
