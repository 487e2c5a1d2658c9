"""What can go wrong with checkpoints; every message is complete for a user."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read: the message names the file, the tensor, expected and got."""


class ConversionError(RuntimeError):
    """A conversion was refused or failed; nothing half-written is left at the target."""
