"""Meeting points with other libraries, each used only where that library is installed."""

from torchao.core.config import ALLOWED_AO_MODULES


def register() -> None:
    """Make torchao's config serialization find our configs by name. Idempotent."""
    ALLOWED_AO_MODULES.add("mixdq_ao")
