"""Commands that have subcommands and also do something themselves."""

import typer


def goes_to_subcommand(context: typer.Context) -> bool:
    """Whether a subcommand follows. Raises BadParameter for options before it, which would be ignored."""
    if context.invoked_subcommand is None:
        return False
    given = [name for name in context.params if _is_typed(context, name)]
    if given:
        options = [option.opts[0] for option in context.command.params if option.name in given]
        what = f"{', '.join(options)} must come after `{context.invoked_subcommand}`"
        raise typer.BadParameter(what, ctx=context)
    return True


def _is_typed(context: typer.Context, name: str) -> bool:
    # Its enum is not public in typer.
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
