"""The errors a user can meet. Each message names the value found, the value wanted, and the next step."""


class PrefillShareError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PrefillShareError, ValueError):
    """A flag, file or combination of settings that cannot work."""


class IdentityError(PrefillShareError):
    """A base, decode module or worker is not the one that was named (contract 4)."""


class SeamError(PrefillShareError):
    """The installed SGLang does not have a hook point that a role needs (contract 5)."""


class HandoffError(PrefillShareError):
    """KV could not be handed from prefill to decode, or must not be."""


class WorkerError(PrefillShareError):
    """A worker process died, did not become ready in time, or answered with something unusable."""


class SandboxError(PrefillShareError):
    """This machine cannot run a model's program without danger, so it was not run."""
