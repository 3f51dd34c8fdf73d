"""What a command with subcommands does beside them."""

import typer


def goes_to_subcommand(context: typer.Context) -> bool:
    """Whether a subcommand does the work. Raises BadParameter where options stand before it: nobody would read them."""
    if context.invoked_subcommand is None:
        return False
    given = [name for name in context.params if _is_typed(context, name)]
    if given:
        options = [option.opts[0] for option in context.command.params if option.name in given]
        what = f"{', '.join(options)} must stand behind `{context.invoked_subcommand}`"
        raise typer.BadParameter(what, ctx=context)
    return True


def _is_typed(context: typer.Context, name: str) -> bool:
    # Its own enum is no public name of typer's.
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
