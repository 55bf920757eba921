"""Command lines: errors of one line, defaults in --help, and checks of numbers."""

import argparse

from common.errors import InputError


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; --help lists the options")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one and the text does not say it in words."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        said = nothing or "(default" in action.help
        return action.help if said else super()._get_help_string(action)


def at_least(least, args, *names):
    """Refuse flags below a number; those that were left out are None."""
    for name in names:
        value = getattr(args, name)
        require(value is None or value >= least, f"--{name}={value}: {least} or more was needed")


def require(condition, message):
    if not condition:
        raise InputError(message)
