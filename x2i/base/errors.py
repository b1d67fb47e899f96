"""The two ways in which a command fails; the CLI turns them into exit codes."""


class X2IError(Exception):
    """A run failed, for a reason that is said in full. Exit code 1."""


class RecipeError(X2IError):
    """A recipe, run file or argument is wrong; nothing was started. Exit code 2."""
