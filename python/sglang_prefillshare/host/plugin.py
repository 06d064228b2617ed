"""SGLang's entry point into this package, called once in every process before it parses its arguments."""

from __future__ import annotations


def register() -> None:
    """Offer our flags; with a role in the environment (a child process), hook what the role needs.

    SGLang logs and swallows what a plugin raises, and goes on without it. `SystemExit` is not swallowed: a role whose
    hooks cannot all be placed ends the process, by name of the missing one (contract 5).
    """
    from sglang_prefillshare.errors import SeamError
    from sglang_prefillshare.host.seams import flag_seams, install, platform_seams, role_seams
    from sglang_prefillshare.settings import current_settings

    settings = current_settings()
    try:
        install(flag_seams())
        install(platform_seams())
        if settings is not None:
            install(role_seams(settings))
    except SeamError as error:
        raise SystemExit(f"prefillshare: {error}") from error
