"""Keeps other libraries' import-time chatter from a user who can do nothing about it."""

import logging
import os
from contextlib import contextmanager

import torch

# torchao warns that its own CUDA libraries do not load into a CPU build of torch, and, through its enums, torch that a
# registration of torchao's is deprecated.
_CHATTY = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_torchao_import():
    """While the block runs, torchao's loading warnings are dropped where torch has no CUDA, or where its libraries are
    not wanted; errors never."""
    unwanted = torch.version.cuda is None or os.environ.get("TORCHAO_FORCE_SKIP_LOADING_SO_FILES") == "1"
    loggers = [logging.getLogger(name) for name in _CHATTY[(0 if unwanted else 1) :]]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet_pipelines() -> None:
    """For the command line: no progress bars of diffusers and transformers while a pipeline is loaded."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
