"""The two ways in which a command fails; the CLI turns them into exit codes."""


class X2IError(Exception):
    """A run failed, for a reason that is said in full. Exit code 1."""


class RecipeError(X2IError):
    """A recipe, run file or argument is wrong; nothing was started. Exit code 2."""


class ElsewhereError(X2IError):
    """Another process of the same run has failed, and says why. Exit code 1."""


class Stopped(BaseException):
    """Ctrl-C or a scheduler's SIGTERM; `args[0]` is the signal. Exit code 128 + signal.

    Not KeyboardInterrupt, which the command-line library would swallow with a bare "Aborted".
    """
