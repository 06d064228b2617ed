"""The role of this process tree: parsed once from the flags, carried to child processes in one environment variable."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Final

from sglang_prefillshare.identity.fingerprint import BaseIdentity
from sglang_prefillshare.protocol import EventStream, Role

ENV_NAME: Final = "SGLANG_PREFILL_SHARE_SETTINGS"
BACKEND_NAME: Final = "prefillshare"
NO_BACKEND: Final = "none"
"""Of a unified server, which hands nothing over."""

DEFAULT_LEASE_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """What every process of one worker knows about its role.

    `identity` is the content identity of the base: on prefill and unified of the model it serves, on decode of the
    model its module was fine-tuned from. `trained` is False where `--prefill-share-allow-untrained` let a module
    through that has no manifest.
    """

    role: Role
    base: str
    identity: BaseIdentity
    trained: bool
    transfer_backend: str
    lease_timeout_s: float = DEFAULT_LEASE_TIMEOUT_S
    """How long prefill keeps pages for a decode worker that does not confirm its copy."""
    adapters: bool = False
    """Whether its decode modules are LoRA adapters on the base, which it serves by name."""
    events: EventStream | None = None
    """Where a prefill worker publishes what its tree holds, if a router can use it."""

    @property
    def shares_kv_pool(self) -> bool:
        """Whether this worker's KV pool must be readable by other processes of this host."""
        return self.role is Role.PREFILL and self.transfer_backend == BACKEND_NAME

    def namespace(self, kv_dtype: str) -> str:
        """The radix namespace (SGLang's `extra_key`) that holds this base's KV and nothing else."""
        return f"prefillshare:{self.identity.runtime_fingerprint(kv_dtype)}"

    def to_env(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_env(cls, text: str) -> RoleSettings:
        data = json.loads(text)
        data["role"] = Role(data["role"])
        data["identity"] = BaseIdentity(**data["identity"])
        data["events"] = None if data["events"] is None else EventStream(**data["events"])
        return cls(**data)


def publish(settings: RoleSettings) -> None:
    """Make `settings` known to this process and to those it starts."""
    os.environ[ENV_NAME] = settings.to_env()


def current_settings() -> RoleSettings | None:
    """This process's role, or None where SGLang runs as if we were not installed."""
    text = os.environ.get(ENV_NAME)
    return RoleSettings.from_env(text) if text else None


def lease_timeout_s() -> float:
    """`RoleSettings.lease_timeout_s` of this process; the default where the backend runs without a role, in tests."""
    settings = current_settings()
    return settings.lease_timeout_s if settings is not None else DEFAULT_LEASE_TIMEOUT_S
