"""Command lines: errors of one line, defaults in --help, checks of numbers, flags from a dataclass, variables."""

import argparse
import ast
import os
import re
import sys
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import get_args

from common.errors import InputError

UNRECOGNIZED = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """Of a script: its docstring as it stands, flags by their whole names, errors of one line."""

    def __init__(self, description=None, formatter_class=argparse.RawDescriptionHelpFormatter, **others):
        super().__init__(description=description, formatter_class=formatter_class, allow_abbrev=False, **others)

    def error(self, message):
        meant = self.most_like(message.removeprefix(UNRECOGNIZED)) if message.startswith(UNRECOGNIZED) else None
        raise InputError(f"{message}; {f'was {meant} meant? ' if meant else ''}--help lists the options")

    def most_like(self, arguments):
        """The flag that the first argument resembles, also as a variable, such as MAX_TRAIN_STEPS=5; or None."""
        name = re.match("-*([^= ]*)", arguments)[1].lower().replace("-", "_")
        return next(iter(get_close_matches(f"--{name}", self._option_string_actions, 1, cutoff=0.8)), None)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one and the text does not say it in words."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        said = nothing or "(default" in action.help
        return action.help if said else super()._get_help_string(action)


class Removed(argparse.Action):
    """A flag that is gone: using it says what replaced it."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise InputError(f"{option_string} is gone: {self.const}")


class Renamed(argparse._StoreAction):
    """A flag with a better name than it had: the old one, second in the list, still works and says the new one."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string != self.option_strings[0]:
            print(f"{option_string} is called {self.option_strings[0]} by now", file=sys.stderr, flush=True)
        super().__call__(parser, namespace, values, option_string)


def settings_by_group(config_class):
    """{group: [field]} of a dataclass of settings; a field that names no group is in that of the field before it."""
    groups, group = {}, None
    for field in fields(config_class):
        group = field.metadata["group"] or group
        groups.setdefault(group, []).append(field)
    return groups


def default_of(field):
    return field.default if field.default_factory is MISSING else field.default_factory()


def add_setting(add, field):
    """A field as a flag: `add` is an argparse group's add_argument. A bool is a switch."""
    meta = field.metadata
    text = f"{meta['help']} (default: {meta['default_text']})" if meta["default_text"] else meta["help"]
    if field.type is bool:
        add(f"--{field.name}", action="store_true", help=text)
        return
    convert = meta["parse"] or next(iter(get_args(field.type)), field.type)  # of `int | None` the first
    metavar = meta["metavar"] or ("N" if convert is int else None)
    add(f"--{field.name}", type=convert, default=default_of(field), metavar=metavar, choices=meta["choices"], help=text)


def build_settings_parser(config_class, description, removed_flags):
    """The parser of a dataclass of settings, in argument groups. `removed_flags`: {flag: what to use instead}."""
    parser = Parser(description, HelpFormatter)
    for name, members in settings_by_group(config_class).items():
        group = parser.add_argument_group(name)
        for field in members:
            if field.metadata["flag"]:
                add_setting(group.add_argument, field)
    for flag, instead in removed_flags.items():
        gone = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(flag, nargs="?", action=Removed, const=instead, **gone)
    return parser


def check_settings(config):
    """Raise InputError for the settings whose checks say what was needed instead."""
    wrong = []
    for field in fields(config):
        value, check, choices = getattr(config, field.name), field.metadata["check"], field.metadata["choices"]
        needed = check(value) if check and value is not None else None
        if choices and value not in choices:  # a default from the environment, which argparse does not compare
            needed = f"one of {', '.join(choices)} was needed"
        optional = ", or leave the flag out" if default_of(field) is None else ""
        if needed:
            wrong.append(f"--{field.name}={value}: {needed}{optional}")
    require(not wrong, "; ".join(wrong))


def variable(name, default=None):
    """An environment variable; one that is empty counts as one that is not set."""
    return os.environ.get(name) or default


def needs(words, holds):
    """A setting's check: value -> `words` where it does not hold, else None."""
    return lambda value: None if holds(value) else words


def parses(parse):
    """A setting's check: what `parse` says, by a ValueError, of a text that it does not take."""

    def check(text):
        try:
            parse(text)
        except ValueError as error:
            return str(error)
        return None

    return check


one_or_more = needs("at least 1 was needed", lambda value: value >= 1)
zero_or_more = needs("0 or more was needed", lambda value: value >= 0)
positive = needs("a positive number was needed", lambda value: value > 0)
share = needs("a share between 0 and 1 was needed", lambda value: 0 <= value <= 1)
below_one = needs("a number from 0 to below 1 was needed", lambda value: 0 <= value < 1)
seed_range = needs("a number from 0 to 4294967295 was needed", lambda value: 0 <= value < 2**32)


def python_list(text):
    """'["a", "b"]' as a list of strings; 'None' or nothing as an empty list."""
    try:
        value = ast.literal_eval(text) if text.strip() else []
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f'a Python list such as \'["a", "b"]\' was needed, not {text!r}') from None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"a Python list of strings was needed, not {text!r}")
    return value


def at_least(least, args, *names):
    """Refuse flags below a number; those that were left out are None."""
    for name in names:
        value = getattr(args, name)
        require(value is None or value >= least, f"--{name}={value}: {least} or more was needed")


def require(condition, message):
    if not condition:
        raise InputError(message)
