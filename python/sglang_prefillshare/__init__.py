"""PrefillShare on SGLang: several fine-tuned models answer from one shared prefill."""

__version__ = "0.1.0"
