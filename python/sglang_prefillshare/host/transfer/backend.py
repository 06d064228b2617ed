"""Adding `prefillshare` to SGLang's transfer backends: a name for the parser, a member for the enum, its classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_prefillshare.settings import BACKEND_NAME


def offer_backend() -> None:
    """Make `--disaggregation-transfer-backend prefillshare` parse and resolve in this process. Idempotent."""
    from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES, add_disagg_transfer_backend_choices
    from sglang.srt.disaggregation.utils import TransferBackend

    if BACKEND_NAME not in DISAGG_TRANSFER_BACKEND_CHOICES:
        add_disagg_transfer_backend_choices([BACKEND_NAME])
    if BACKEND_NAME not in TransferBackend._value2member_map_:
        member = object.__new__(TransferBackend)
        member._name_ = BACKEND_NAME.upper()
        member._value_ = BACKEND_NAME
        TransferBackend._member_map_[member._name_] = member
        TransferBackend._value2member_map_[BACKEND_NAME] = member
        TransferBackend._member_names_.append(member._name_)
        type.__setattr__(TransferBackend, member._name_, member)


def get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """Hook on SGLang's table of backend classes."""
    if transfer_backend.value != BACKEND_NAME:
        return original(transfer_backend, class_type)
    from sglang_prefillshare.host.transfer.decode_end import PrefillShareKVReceiver
    from sglang_prefillshare.host.transfer.manager import PrefillShareKVBootstrapServer
    from sglang_prefillshare.host.transfer.prefill_end import PrefillShareKVSender

    classes: dict[str, Any] = {
        "manager": create_manager,
        "sender": PrefillShareKVSender,
        "receiver": PrefillShareKVReceiver,
        "bootstrap_server": PrefillShareKVBootstrapServer,
    }
    return classes.get(class_type.value) or original(transfer_backend, class_type)


def create_manager(args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool = False) -> Any:
    """The end that a worker's disaggregation mode asks for."""
    from sglang.srt.disaggregation.utils import DisaggregationMode

    from sglang_prefillshare.host.transfer.decode_end import DecodeKVManager
    from sglang_prefillshare.host.transfer.prefill_end import PrefillKVManager

    end = PrefillKVManager if disaggregation_mode == DisaggregationMode.PREFILL else DecodeKVManager
    return end(args, disaggregation_mode, server_args, is_mla_backend)
