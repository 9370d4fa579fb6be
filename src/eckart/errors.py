"""Every error that eckart raises on purpose.

    EckartError
    ├── ModelError      a model folder or its weights cannot be used
    ├── MatrixError     a matrix, type or layer that the model does not have
    ├── RankError       a rank or rho outside its range
    ├── SpectrumError   a weight or singular values that nothing can be said of
    ├── TaskError       a task file or an example in it is wrong
    ├── PlanError       a plan does not fit the model it is applied to
    ├── RecipeError     a setting is unknown or out of range
    └── OutputError     a result cannot be written

Each message says what was given and where, what is allowed, and what to do. Each class is also a
`ValueError` or `OSError`, so code that does not know eckart can catch it.
"""


class EckartError(Exception):
    """The input or the data is wrong; the command line prints the message alone and exits with 1."""


class ModelError(EckartError, ValueError):
    """A model folder or its weights cannot be used."""


class MatrixError(EckartError, ValueError):
    """A matrix, type or layer that the model does not have."""


class RankError(EckartError, ValueError):
    """A rank or rho outside its range."""


class SpectrumError(EckartError, ValueError):
    """A weight, or singular values, that nothing can be said of."""


class TaskError(EckartError, ValueError):
    """A task file, or an example in it, is wrong."""


class PlanError(EckartError, ValueError):
    """A plan does not fit the model it is applied to."""


class RecipeError(EckartError, ValueError):
    """A setting is unknown or out of range."""


class OutputError(EckartError, OSError):
    """A result cannot be written where it was asked for."""
