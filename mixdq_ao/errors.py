"""The errors of mixdq_ao: one base class, and one child for each thing that a user can hold wrong.

A message names the layer, file or argument, the rule, the value that was found, and what to do instead.
"""


class MixDQError(ValueError):
    """Base of every error that mixdq_ao raises on purpose."""


class CheckpointError(MixDQError):
    """A file that cannot be used: the message names the file, the key and the rule that it breaks.

    Attributes: ``file`` and ``key`` (strings, ``key`` is empty where the whole file is meant), ``rule``.
    """

    def __init__(self, file, key: str, rule: str, found: str = "", advice: str = ""):
        self.file, self.key, self.rule = str(file), key, rule
        text = f"{self.file}: "
        if key:
            text += f"'{key}': "
        text += rule
        if found:
            text += f"; found {found}"
        if advice:
            text += f". {advice}"
        super().__init__(text)


class PlanError(MixDQError):
    """A bit plan that does not fit the model, the checkpoint or the widths that exist."""


class UnsupportedError(MixDQError, NotImplementedError):
    """An operation that a quantized weight cannot do; the message says what to do instead."""


def name_list(names, limit: int = 8) -> str:
    """The first ``limit`` of ``names`` for an error text, and how many more there are."""
    names = sorted(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
