"""Every error that a person can cause or mend. A message says what is wrong, where, and what to do.

The command line turns a `FinespunError` into one message and exit code 2; anything else is a bug of ours and keeps
its traceback.
"""


class FinespunError(Exception):
    """Base of all errors that finespun raises on purpose."""


class RecipeError(FinespunError):
    """A recipe says something that cannot be: an unknown key, a value out of range, two settings that exclude."""


class DataError(FinespunError):
    """Texts that cannot be read, understood or trained as they are."""


class ModelNotFound(FinespunError):
    """No place that was tried has the model."""


class ModelError(FinespunError):
    """A model that was found but cannot be used."""


class RunError(FinespunError):
    """A run folder that is missing, torn, already taken, or does not match what it is asked to continue."""


class TrainingDiverged(FinespunError):
    """The loss or the gradient stopped being a finite number."""


class OutOfMemory(FinespunError):
    """Training needs more memory than there is."""


class TrainingInterrupted(FinespunError):
    """A person or the system asked the run to stop; it was saved and can go on."""


class GenerationError(FinespunError):
    """A text cannot be written as it was asked for."""


class ServingError(FinespunError):
    """An address at which a server cannot listen."""


class JudgeError(FinespunError):
    """A judging model that refuses, or cannot be reached."""
